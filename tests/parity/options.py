"""From the references' configuration keys to our methods."""

import re
from typing import Any

from tests.parity.case import Case, Unsupported
from vpt_jax.methods import (
    VAPT,
    VPT,
    Adapter,
    Bias,
    ClsToken,
    Full,
    Linear,
    Method,
    MLPHead,
    Partial,
    VPTAdd,
    VPTBelow,
    VPTPad,
    VPTPixels,
)
from vpt_jax.methods.vapt import ACTIVATIONS

# Settings that evaluation mode leaves without effect.
_TRAIN_ONLY = ('DROPOUT', 'DROPOUT_MLP')
# Settings of VAPT, which its repository lists for plain VPT too.
_VAPT_ONLY = ('ACTIVATION', 'HIDDEN_DIM', 'CONV', 'KERNEL', 'PADDING', 'CHANNELWISE', 'FEAT_PROJECTOR',
              'SHARE_PROJECTOR', 'VPT_DEPTH', 'LEARNABLE_SCALE')  # fmt: skip
_PIXELS = {
    'prepend-pixel': 'uniform',
    'prepend-pixel-gaussian': 'gaussian',
    'prepend-pixel-imgnettransform': 'imagenet',
}
_WITH_PROMPT = {
    'prompt': (),
    'prompt+bias': (Bias(),),
    'cls+prompt': (ClsToken(),),
    'cls-reinit+prompt': (ClsToken(redraw=True),),
    'prompt-noupdate': (),
}
# How cases call methods that the references call 'prompt'.
_PROMPTS = ('vapt', 'vpt-deep', 'vpt-shallow')
_WITHOUT_PROMPT = {
    'linear': (),
    'end2end': (Full(),),
    'tinytl-bias': (Bias(),),
    'cls': (ClsToken(),),
    'cls-reinit': (ClsToken(redraw=True),),
}


def transfer_type(case: Case) -> str:
    """TRANSFER_TYPE of a case; others name the method instead, with a location (ConvNets) or a backbone (MAE, MoCo)."""
    method = method_of(case)
    return str(case.config.get('transfer_type', 'prompt' if method in _PROMPTS else method))


def method_of(case: Case) -> str:
    """The method of a case without what it is on."""
    return re.split(':| on ', str(case.meta.get('method', '')))[0]


def known_transfer_type(name: str) -> bool:
    """Whether `members` knows what the reference means by this name."""
    return name in _WITH_PROMPT or name in _WITHOUT_PROMPT or name == 'adapter' or _partial(name) is not None


def _partial(name: str) -> int | None:
    kind, _, count = name.partition('-')
    return int(count) if kind == 'partial' and count.isdigit() else None


class Options:
    """The options of a case; every one has to be taken, so that none is ignored by accident."""

    def __init__(self, case: Case):
        config = case.config
        # `defaults` are the values in force, listed for the reader; only those of prompts.
        self._defaults = {f'PROMPT.{key}': value for key, value in config.get('defaults', {}).items()}
        self._given = {key.removeprefix('MODEL.'): value for key, value in config.get('options', {}).items()}
        self._given.setdefault('MLP_NUM', config.get('mlp_num', 0))
        if method_of(case) == 'vpt-deep':
            self._given.setdefault('PROMPT.DEEP', True)
        if 'location' in config:  # the form of ConvNets' cases, whose location is listed with every method
            keys = ('num_tokens', 'location', 'initiation') if transfer_type(case) in _WITH_PROMPT else ()
            self._given |= {f'PROMPT.{key.upper()}': config[key] for key in keys if key in config}

    def take(self, key: str, default: Any) -> Any:
        """The value of an option, which counts as known from now on."""
        fallback = self._defaults.pop(key, default)
        return self._given.pop(key, fallback)

    def require(self, key: str, default: Any, why: str = '') -> None:
        """Takes an option that may only have its default here."""
        value = self.take(key, default)
        if value != default:
            raise Unsupported(f'option {key}={value} {why}'.rstrip())

    def pass_over(self, key: str) -> None:
        """Drops a listed default that has no effect here; given as an option it stays unknown."""
        self._defaults.pop(key, None)

    def finish(self) -> None:
        """Refuses what nobody took."""
        left = sorted(self._given) or sorted(self._defaults)
        if left:
            raise Unsupported(f'option {left[0]}')


def members(case: Case, vapt: type[VAPT] = VAPT) -> list[Method]:
    """The methods whose stack is what a case ran, the head last.

    Args:
      case: the case.
      vapt: the class to use for VAPT.

    Raises:
      Unsupported: an option that we do not know, or have no such variant of.
    """
    transfer, options = transfer_type(case), Options(case)
    layers = options.take('MLP_NUM', 0) + 1
    head = MLPHead(layers=layers) if layers > 1 else Linear()
    if transfer in _WITH_PROMPT:
        body = [_prompt(case, options, transfer, vapt), *_WITH_PROMPT[transfer]]
    elif transfer == 'adapter':
        options.require('ADAPTER.STYLE', 'Pfeiffer')
        body = [Adapter(reduction=options.take('ADAPTER.REDUCATION_FACTOR', 8))]
    elif transfer in _WITHOUT_PROMPT:
        body = [*_WITHOUT_PROMPT[transfer]]
    elif count := _partial(transfer):
        body = [Partial(blocks=count)]
    else:
        raise Unsupported(f'method {transfer!r}')
    options.finish()
    return [*body, head]


def _prompt(case: Case, options: Options, transfer: str, vapt: type[VAPT]) -> Method:
    for key in _TRAIN_ONLY:
        options.take(f'PROMPT.{key}', 0.0)
    convnet = 'location' in case.config
    initiation = options.take('PROMPT.INITIATION', 'random')
    if initiation != 'random' and not (convnet and initiation == 'gaussian'):
        raise Unsupported(f'option PROMPT.INITIATION={initiation}')
    adaptive = options.take('PROMPT.ADAPTIVE', method_of(case) == 'vapt')
    if adaptive:
        return _vapt(options, vapt)
    for key in _VAPT_ONLY:
        options.pass_over(f'PROMPT.{key}')
    location = options.take('PROMPT.LOCATION', 'prepend')
    if location == 'prepend':
        return _vpt(options)
    for key, default in (('PROJECT', -1), ('NUM_DEEP_LAYERS', None), ('REVERSE_DEEP', False), ('DEEP_SHARED', False),
                         ('FORWARD_DEEP_NOEXPAND', False), ('VIT_POOL_TYPE', 'original')):  # fmt: skip
        options.require(f'PROMPT.{key}', default, f'with LOCATION {location}')
    count, deep = options.take('PROMPT.NUM_TOKENS', 5), options.take('PROMPT.DEEP', False)
    if location in ('add', 'add-1'):
        return VPTAdd(single=location == 'add-1', deep=deep)
    if deep:
        raise Unsupported(f'option PROMPT.DEEP=True with LOCATION {location}')
    if location in _PIXELS:
        return VPTPixels(num_tokens=count, pixel_init=_PIXELS[location])
    pixel_init = 'gaussian' if initiation == 'gaussian' else 'imagenet'
    if location == 'pad':
        return VPTPad(num_pixels=count, pixel_init=pixel_init)
    if location == 'below':
        if transfer not in ('prompt', 'prompt-noupdate'):
            raise Unsupported(f'option PROMPT.LOCATION=below with {transfer}')
        return VPTBelow(num_channels=count, pixel_init=pixel_init if convnet else 'uniform')
    raise Unsupported(f'option PROMPT.LOCATION={location}')


def _vpt(options: Options) -> VPT:
    deep = options.take('PROMPT.DEEP', False)
    project = options.take('PROMPT.PROJECT', -1)
    layers = options.take('PROMPT.NUM_DEEP_LAYERS', None)
    reverse = options.take('PROMPT.REVERSE_DEEP', False)
    shared = options.take('PROMPT.DEEP_SHARED', False)
    drop = options.take('PROMPT.FORWARD_DEEP_NOEXPAND', False)
    pool = options.take('PROMPT.VIT_POOL_TYPE', 'original')
    if (drop and pool in ('img_pool', 'prompt_pool')) or (reverse and pool == 'img_pool'):
        # The reference then counts tokens that are not where it believes.
        raise Unsupported(f'option PROMPT.VIT_POOL_TYPE={pool} without prompts at their place')
    return VPT(
        num_tokens=options.take('PROMPT.NUM_TOKENS', 5),
        deep=deep,
        project=project if project > -1 else None,
        deep_layers=layers if deep and not reverse else None,
        drop_after=bool(drop and deep and layers and not reverse),
        # The reference's loops for these two variants do not look at DEEP_SHARED.
        shared=bool(shared and deep and not drop and not reverse),
        pool=pool,
        last_layers_overwriting_patches=layers if reverse else None,
    )


def _vapt(options: Options, vapt: type[VAPT]) -> VAPT:
    options.require('PROMPT.DEEP', True, 'with ADAPTIVE')
    for key, default in (('LOCATION', 'prepend'), ('PROJECT', -1), ('NUM_DEEP_LAYERS', None), ('REVERSE_DEEP', False),
                         ('DEEP_SHARED', False), ('FORWARD_DEEP_NOEXPAND', False),
                         ('VIT_POOL_TYPE', 'original')):  # fmt: skip
        options.require(f'PROMPT.{key}', default, 'with ADAPTIVE')
    activation = options.take('PROMPT.ACTIVATION', 'relu')
    conv = options.take('PROMPT.CONV', True)
    projector = options.take('PROMPT.FEAT_PROJECTOR', True)
    channelwise = options.take('PROMPT.CHANNELWISE', True)
    shared, scale = options.take('PROMPT.SHARE_PROJECTOR', True), options.take('PROMPT.LEARNABLE_SCALE', False)
    return vapt(
        num_tokens=options.take('PROMPT.NUM_TOKENS', 5),
        hidden=options.take('PROMPT.HIDDEN_DIM', 8),
        # The reference takes every name that it does not know for the identity.
        activation=activation if activation in ACTIVATIONS else 'identity',
        conv=conv,
        kernel=options.take('PROMPT.KERNEL', 2),
        padding=options.take('PROMPT.PADDING', 0),
        depthwise=conv and not channelwise,
        projector=projector,
        shared_projector=shared or not projector,
        static_layers=options.take('PROMPT.VPT_DEPTH', 1),
        learnable_scale=scale and projector,
    )
