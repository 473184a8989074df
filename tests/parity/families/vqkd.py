"""The VQ-KD tokenizer: every step from pixels to tokens and back to the teacher's features."""

import jax
import jax.numpy as jnp

from tests.parity import ported
from tests.parity.case import Case, Report
from tests.parity.families.beit import compare_outputs
from tests.parity.prompted import quick_compile
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.models import vqkd


def claims(case: Case) -> bool:
    """Cases of the tokenizer."""
    return str(case.meta.get('kind', '')).startswith('modeling_vqkd')


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds; tokens must be the same."""
    config = case.config
    model, params = vqkd.load(
        ArraySource(case.group('backbone'), case.name),
        heads=config['encoder']['num_heads'], decoder_heads=config['decoder']['num_heads'],
        pixels={'default': 'half', 'imagenet_norm': 'imagenet'}[config['process_type']],
    )  # fmt: skip
    images = vqkd.check_images(jnp.asarray(case.arrays['in/images']))

    def steps(model):
        seen = model(images)
        features = model.features(images)
        pre_quant = model.encode_task(features)
        grid = model.encoder.grid(*images.shape[1:3])
        distances = vqkd.distances(seen.z, model.codebook)
        return seen, {
            'preprocessed': model.normalise(images), 'encoder_patch_features': features, 'features': features,
            'pre_quant': pre_quant, 'z_normalised': seen.z, 'distances': distances, 'logits': -distances,
            'quantized': seen.codes.reshape(-1, *grid, model.code_width), 'decoder': seen.rebuilt,
        }  # fmt: skip

    run = jax.jit(lambda: model.apply({'params': params}, method=steps), compiler_options=quick_compile())
    seen, outputs = run()
    report.compare('tokens', 'out/tokens', seen.ids, case.arrays['out/tokens'], atol=0.5)
    rebuild, quantization = (part.mean() for part in vqkd.losses(seen, jnp.asarray(case.arrays['in/target'])))
    quantization *= config['beta']
    outputs |= {'rec_loss': rebuild, 'emb_loss': quantization, 'loss': rebuild + quantization}
    ported.close(report, 'out/tokens_alone', model.apply({'params': params}, images, method='tokens'), seen.ids)
    compare_outputs(case, report, outputs, but=('tokens',))
