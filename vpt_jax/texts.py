"""Features of class names for CLIP's head: `python -m vpt_jax.texts --weights=CLIP --vocabulary=BPE --names=FILE`.

Writes the .npz that `--config.head.texts` takes (`configs/vp.py:head=clip_head`). The weights are a whole CLIP's, a
path or an address such as hf:openai/clip-vit-base-patch32; the vocabulary is OpenAI's bpe_simple_vocab_16e6.txt.gz or
the tokenizer.json of a CLIP on the Hugging Face hub; names and templates are text files, one a line.
"""

from pathlib import Path

from absl import flags

from vpt_jax import cli
from vpt_jax.errors import UsageError
from vpt_jax.methods.clip_head import save_texts
from vpt_jax.models import clip_text
from vpt_jax.models.clip_tokens import Tokenizer


def main(weights: str, vocabulary: str, names: str, templates: str | None, out: str) -> None:
    """Writes the features."""
    classes = _lines(names)
    texts = clip_text.texts(classes, _lines(templates) if templates else (clip_text.TEMPLATE,))
    tokenizer = Tokenizer(vocabulary)
    model, params = clip_text.load_text_tower(weights)
    features = clip_text.text_features(model, params, tokenizer(texts, model.context))
    save_texts(out, features, params['logit_scale'])
    print(f'{len(texts)} texts of {len(classes)} classes, such as {texts[0]!r}, written to {out}')


def _lines(path: str) -> list[str]:
    try:
        found = [line.strip() for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'cannot read {path}: {error}') from error
    if not found:
        raise UsageError(f'{path} is empty')
    return found


if __name__ == '__main__':
    cli.run_with_flags(
        main,
        __doc__,
        [
            flags.DEFINE_string('weights', None, 'a file with the text tower of a CLIP', required=True),
            flags.DEFINE_string('vocabulary', None, 'bpe_simple_vocab_16e6.txt.gz or tokenizer.json', required=True),
            flags.DEFINE_string('names', None, 'file with the names of the classes, in order', required=True),
            flags.DEFINE_string('templates', None, 'file with templates; by default "This is a photo of a {}."'),
            flags.DEFINE_string('out', 'texts.npz', 'where to write'),
        ],
    )
