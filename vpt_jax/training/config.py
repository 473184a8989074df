"""From a config file to a run: the fields every config has, and what they become.

A config file is Python with `get_config(arg)`; `arg` is what follows the colon in
`--config=FILE:dataset=...,backbone=...`.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from vpt_jax import data, methods
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.zoo import Backbone, load_backbone
from vpt_jax.training import distributed, loop
from vpt_jax.training.recipe import Recipe


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
    """Reads `'dataset=digits,backbone=vit_b16_in21k'`.

    Args:
      arg: comma-separated `name=value` pairs, or None.
      **defaults: the names that exist, with the values they have if absent.

    Raises:
      UsageError: a name that does not exist, or a part without `=`.
    """
    values = dict(defaults)
    for part in filter(None, (arg or '').split(',')):
        name, equals, value = part.partition('=')
        if name not in defaults:
            raise unknown('config argument', name, defaults)
        if not equals or not value:
            raise UsageError(f'config arguments are written name=value, got {part!r}')
        values[name] = value
    return values


def method(name: str, **settings) -> ConfigDict:
    """The `method` or `head` field of a config: a name of `methods.METHODS` and every setting it has.

    All settings appear, with their defaults, so that a misspelt one on the command line is refused.
    """
    if '+' in name:
        return ConfigDict({'name': name, **{n: _settings(n, settings.pop(n, {})) for n in name.split('+')}, **settings})
    return ConfigDict({'name': name, **_settings(name, settings)})


def _settings(name: str, given: dict) -> dict:
    if name not in methods.METHODS:
        raise unknown('method', name, methods.METHODS)
    built = methods.build(name, **given)
    fields = {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}
    return {k: config_dict.placeholder(int) if v is None else v for k, v in fields.items()}


#: What `data.train_on` may be; the second is what final runs on VTAB-1k train on.
TRAIN_ON = ('train', 'train+val')
#: What VPT's and VAPT's tables are made with.
PUBLISHED_BACKBONE = 'vit_b16_in21k'
#: The published protocols take thousands of steps; on the embedded digits, in minutes on a CPU, small batches do.
DIGITS = {'epochs': 20, 'warmup_epochs': 2, 'batch_size': 4, 'eval_batch_size': 64}


def default(
    arg: str | None, digits: dict | None = None, head: str = 'linear', start: str = 'kaiming', **recipe
) -> ConfigDict:
    """A config with the published prompt protocol (VPT, VAPT): the method is for the config file to set.

    Args:
      arg: `dataset=...,backbone=...` with the forms of `data.load` and `load_backbone`; for `vpt_jax.sweep`
        `benchmark=...` instead of a dataset, with the published backbone if none is given.
      head: name of the head, which `head=...` in `arg` replaces (`head=clip_head`).
      start: how a linear head starts, a name of `methods.head.INITS`.
      digits: fields of `Recipe` for the embedded default task, over `recipe` and `DIGITS`.
      **recipe: fields of `Recipe` for everything else, over its defaults.
    """
    where = parse_arg(arg, dataset='', backbone='', benchmark='', head=head)
    if where['benchmark']:
        if where['dataset']:
            raise UsageError('give either dataset=... (vpt_jax.train) or benchmark=... (vpt_jax.sweep), not both')
        where['backbone'] = where['backbone'] or PUBLISHED_BACKBONE
    else:
        where['dataset'], where['backbone'] = where['dataset'] or 'digits', where['backbone'] or 'tiny_vit64'
    if where['dataset'] == 'digits':
        recipe = {**recipe, **DIGITS, **(digits or {})}
    r = Recipe(**recipe)
    prompts = 'prompt_fgvc' if where['benchmark'] == 'fgvc' else 'prompt'
    return ConfigDict({
        'benchmark': where['benchmark'],
        'dataset': where['dataset'],
        'backbone': where['backbone'],
        'image_size': config_dict.placeholder(int),
        'seed': r.seed,
        'method': {'name': ''},
        'head': method(where['head'], **({'start': start} if where['head'] == 'linear' else {})),
        'data': {'augment': config_dict.placeholder(str), 'resize': config_dict.placeholder(str),
                 'normalise': 'backbone', 'train_on': 'train', 'dir': config_dict.placeholder(str), 'source': 'auto',
                 'memory_gb': config_dict.placeholder(float), 'on_bad_image': 'stop', 'on_empty_class': 'stop'},
        'optim': {'name': r.optimizer, 'lr': r.base_lr, 'weight_decay': r.weight_decay, 'momentum': r.momentum,
                  'bias_multiplier': r.bias_multiplier, 'decay_biases': r.decay_biases,
                  'head_weight_decay': config_dict.FieldReference(r.head_weight_decay, field_type=float),
                  'schedule': r.schedule, 'per_step': r.per_step},
        'train': {'epochs': r.epochs, 'warmup_epochs': r.warmup_epochs, 'batch_size': r.batch_size,
                  'eval_batch_size': r.eval_batch_size, 'eval_every_epochs': r.eval_every_epochs,
                  'log_every_steps': r.log_every_steps, 'label_smoothing': r.label_smoothing, 'mixup': r.mixup,
                  'precision': r.precision, 'cache_prefix': r.cache_prefix, 'shard_backbone': r.shard_backbone,
                  'linear_probe': True},
        'checkpoint': {'every_steps': r.checkpoint_every_steps, 'keep': r.keep_checkpoints},
        'sweep': {'grid': prompts if r.optimizer == 'sgd' else 'finetune', 'lr': (), 'weight_decay': (), 'axes': '',
                  'ties': 'smaller', 'fast_lr': 5.0},
    })  # fmt: skip


def recipe(config: ConfigDict) -> Recipe:
    """The `Recipe` of a config."""
    train = {k: v for k, v in config.train.items() if k != 'linear_probe'}
    return Recipe(
        optimizer=config.optim.name, base_lr=float(config.optim.lr), weight_decay=config.optim.weight_decay,
        momentum=config.optim.momentum, bias_multiplier=config.optim.bias_multiplier, per_step=config.optim.per_step,
        schedule=config.optim.schedule, decay_biases=config.optim.decay_biases,
        head_weight_decay=config.optim.head_weight_decay,
        checkpoint_every_steps=config.checkpoint.every_steps, keep_checkpoints=config.checkpoint.keep,
        seed=config.seed, **train,
    )  # fmt: skip


def build_method(field: ConfigDict) -> methods.Method:
    """The method of a `method` or `head` field."""
    settings = field.to_dict()
    return methods.build(settings.pop('name'), **settings)


def whole_method(config: ConfigDict) -> methods.Method:
    """The method of a config with its head."""
    return methods.with_head(build_method(config.method), build_method(config.head))


def network(config: ConfigDict) -> Backbone:
    """The backbone of a config, with the classifier that it came with if the method needs that.

    A config whose method asks for settings of the network has them in `model`.
    """
    own_classifier, settings = whole_method(config).needs_classifier, dict(config.get('model', {}))
    return distributed.main_first(lambda: load_backbone(
        config.backbone, image_size=config.image_size, own_classifier=own_classifier,
        on_host=config.train.shard_backbone, **settings,
    ))  # fmt: skip


def build_preprocess(config: ConfigDict, backbone: Backbone) -> data.Preprocess:
    """How a config's images become network inputs.

    What `data.resize` and `data.augment` leave open is the benchmark's own where the dataset is a benchmark's task,
    else the backbone's, without augmentation. `data.normalise` is 'backbone', 'protocol' (the benchmark's) or a name
    of `data.STATISTICS`.

    Raises:
      UsageError: an unknown name, or a protocol's pixels for a dataset that has no protocol.
    """
    protocol, pixels, given = data.protocol_of(config.dataset), backbone.pixels, config.data
    resize = given.resize or (protocol or pixels).resize
    augment = given.augment or (protocol.augment if protocol else 'none')
    if augment == 'fgvc' and resize != 'fgvc' and not given.augment:  # no larger image to crop from
        augment = 'flip'
    if given.normalise == 'backbone':
        mean, std = pixels.mean, pixels.std
    elif given.normalise == 'protocol':
        if protocol is None:
            raise UsageError(f'--config.data.normalise=protocol: dataset {config.dataset!r} has no published protocol')
        mean, std = protocol.mean, protocol.std
    elif given.normalise in data.STATISTICS:
        mean, std = data.STATISTICS[given.normalise]
    else:
        raise unknown('normalise', given.normalise, ('backbone', 'protocol', *data.STATISTICS))
    return data.Preprocess(build_method(config.method).input_size(backbone.model), resize, augment, mean, std)


def load_dataset(config: ConfigDict, preprocess: data.Preprocess) -> data.Dataset:
    """The dataset of a config.

    Raises:
      UsageError: see `data.load`; or `data.train_on` is unknown.
    """
    given = config.data
    if given.train_on not in TRAIN_ON:
        raise unknown('train_on', given.train_on, TRAIN_ON)
    return distributed.together(lambda: data.load(
        config.dataset, preprocess, seed=config.seed, on_bad_image=given.on_bad_image,
        on_empty_class=given.on_empty_class, data_dir=given.dir, source=given.source, memory_gb=given.memory_gb,
    ))  # fmt: skip


def run(config: ConfigDict, workdir: str | Path, backbone=None) -> tuple[loop.Result, data.Dataset, data.Preprocess]:
    """Runs what a config says.

    Args:
      config: from a config file.
      workdir: the run's folder.
      backbone: instead of the one that the config names.

    Returns:
      (result, dataset, preprocess).

    Raises:
      UsageError, DivergedError, StoppedError: see `fit`.
    """
    if config.benchmark:
        raise UsageError(
            f'benchmark={config.benchmark} is for `python -m vpt_jax.sweep`; train one task with '
            f'dataset={config.benchmark}:TASK'
        )
    how, adapted = recipe(config), whole_method(config)
    backbone = backbone or network(config)
    adapted.check(backbone.model)
    preprocess = build_preprocess(config, backbone)
    dataset = load_dataset(config, preprocess)
    if config.data.train_on == 'train+val':
        dataset = dataset.with_val_in_train()
    result = loop.fit(adapted, dataset, backbone, workdir=workdir, recipe=how, preprocess=preprocess)
    return result, dataset, preprocess
