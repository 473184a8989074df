"""What the command-line programs share: flags, errors as sentences, exit codes.

0: done. 1: the loss diverged. 2: something the user can mend. 130, 143: stopped by Ctrl-C or SIGTERM, state saved.
"""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from vpt_jax.errors import UsageError
from vpt_jax.training.loop import DivergedError, StoppedError


def guarded(main: Callable[[], None]) -> Callable[[], None]:
    """`main` with the exceptions that are meant for a person printed as one sentence and turned into an exit code."""

    def run() -> None:
        try:
            main()
        except UsageError as error:
            sys.exit(_say(error, 2))
        except DivergedError as error:
            sys.exit(_say(error, 1))
        except StoppedError as error:
            sys.exit(_say(error, 128 + error.signal))
        except KeyboardInterrupt:
            sys.exit(_say('interrupted', 130))

    return run


def _say(message: object, code: int) -> int:
    print(f'error: {message}' if code in (1, 2) else message, file=sys.stderr, flush=True)
    return code


def run_with_config(main: Callable, description: str) -> None:
    """Runs `main(config, workdir)` with `--config FILE[:args]`, `--config.field=value` and `--workdir DIR`.

    A misspelt field or file is answered with one sentence and exit code 2.
    """
    config = config_flags.DEFINE_config_file('config', None, 'A config file, FILE.py or FILE.py:name=value,...')
    workdir = flags.DEFINE_string('workdir', None, 'Everything the run writes goes here; by default runs/CONFIG.')
    flags.mark_flag_as_required('config')

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, UsageError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            sys.exit(_say(_flag_error(error, argv), 2))
        if len(rest) > 1:
            sys.exit(_say(f'unexpected argument {rest[1]!r}: flags are written --config.field=value', 2))
        return rest

    def start(_) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
        name = config_flags.get_config_filename(flags.FLAGS['config']).rsplit('/', 1)[-1].removesuffix('.py')
        guarded(lambda: main(config.value, workdir.value or f'runs/{name}'))()

    sys.modules['__main__'].__doc__ = description
    app.run(start, flags_parser=parse)


def _flag_error(error: Exception, argv: list[str]) -> str:
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text or f'cannot read the flags {" ".join(argv[1:])}'
