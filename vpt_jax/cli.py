"""What the command-line programs share: flags, errors as sentences, exit codes.

0: done. 1: the loss diverged. 2: something the user can mend. 130, 143: stopped by Ctrl-C or SIGTERM, state saved.
"""

import contextlib
import ctypes
import difflib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from vpt_jax.errors import UsageError, unknown
from vpt_jax.training import distributed
from vpt_jax.training.compiled import keep_compiled
from vpt_jax.training.loop import DivergedError
from vpt_jax.training.stopping import StoppedError


def guarded(main: Callable[[], int | None]) -> Callable[[], None]:
    """`main` with the exceptions that are meant for a person printed as one sentence and turned into an exit code.

    A number that `main` returns is the exit code.
    """

    def run() -> None:
        try:
            code = main()
            sys.stdout.flush()
            if code:
                sys.exit(code)
        except UsageError as error:
            sys.exit(_say(error, 2))
        except DivergedError as error:
            sys.exit(_say(error, 1))
        except StoppedError as error:
            sys.exit(_say(error, 128 + error.signal))
        except KeyboardInterrupt:
            sys.exit(_say('interrupted', 130))
        except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return run


def _say(message: object, code: int) -> int:
    if distributed.is_main():
        print(f'error: {message}' if code in (1, 2) else message, file=sys.stderr, flush=True)
    return code


def run_with_config(
    main: Callable,
    description: str,
    holders: Sequence[flags.FlagHolder] = (),
    place: Callable[[str, ConfigDict], str] = lambda name, config: f'runs/{name}',
    processes: bool = False,
) -> None:
    """Runs `main(config, workdir)` with `--config FILE[:args]`, `--config.field=value` and `--workdir DIR`.

    A misspelt field or file is answered with one sentence and exit code 2.

    Args:
      main: the program.
      description: for `--help`.
      holders: other flags of the program, given to `main` by name.
      place: the default of `--workdir`, from the config file's name and the config.
      processes: whether several processes may run it as one (`training.distributed`).
    """
    config = config_flags.DEFINE_config_file('config', None, 'A config file, FILE.py or FILE.py:name=value,...')
    workdir = flags.DEFINE_string('workdir', None, 'Everything the run writes goes here; by default runs/CONFIG.')
    flags.mark_flag_as_required('config')
    join = _joining() if processes else _alone

    def start() -> None:
        join()
        given = {holder.name: holder.value for holder in holders}
        main(config.value, workdir.value or place(config_name(), config.value), **given)

    _run(lambda arguments: start(), description, takes_arguments=False)


def _joining() -> Callable[[], None]:
    mode = flags.DEFINE_string(
        'distributed', 'auto', 'auto: be one run with the processes that SLURM, Open MPI or a TPU pod started; or off'
    )
    coordinator = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for processes started by hand')
    count = flags.DEFINE_integer('num_processes', None, 'how many processes were started by hand')
    number = flags.DEFINE_integer('process_id', None, 'which of them this one is, from 0')

    def join() -> None:
        distributed.start(mode.value, coordinator.value, count.value, number.value)
        if not distributed.is_main():  # one report of the run is enough
            sys.stdout = open(os.devnull, 'w')  # noqa: SIM115

    return join


def _alone() -> None:
    count = distributed.started_processes() or 1
    if count > 1:
        raise UsageError(
            f'this program runs as one process, and {count} were started: start one (it uses all devices of its '
            'machine); sweeps use several machines with --launcher=slurm'
        )


def config_name() -> str:
    """Name of the config file that was given, without its ending and its arguments (which may have paths in them)."""
    return Path(config_flags.get_config_filename(flags.FLAGS['config']).split(':', 1)[0]).stem


def run_with_flags(
    main: Callable[..., int | None],
    description: str,
    holders: Sequence[flags.FlagHolder],
    takes_arguments: bool = False,
) -> None:
    """Runs `main(*arguments, **flags)`; a bad or missing flag is answered with one sentence and exit code 2.

    Args:
      main: the program; a number it returns is the exit code.
      description: for `--help`.
      holders: what `flags.DEFINE_...` returned for each of the program's flags.
      takes_arguments: whether anything but flags may be on the command line.
    """
    _run(lambda arguments: main(*arguments, **{h.name: h.value for h in holders}), description, takes_arguments)


def _run(main: Callable[[list[str]], int | None], description: str, takes_arguments: bool) -> None:
    def parse(argv: list[str]) -> list[str]:
        flags.FLAGS.set_gnu_getopt()  # flags may follow arguments
        missing = _missing_config(argv)
        if missing:
            sys.exit(_say(missing, 2))
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, UsageError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            sys.exit(_say(_flag_error(error, argv), 2))
        if len(rest) > 1 and not takes_arguments:
            form = '--config.field=value' if 'config' in flags.FLAGS else '--name=value'
            sys.exit(_say(f'unexpected argument {rest[1]!r}: flags are written {form}', 2))
        return rest

    def start(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
        keep_compiled()
        guarded(lambda: main(argv[1:]))()

    sys.modules['__main__'].__doc__ = description
    _keep_freed_memory()
    app.run(start, flags_parser=parse)


def _keep_freed_memory() -> None:
    """Has glibc keep what a step on the CPU frees for the next one, where it would go back to the kernel.

    A step's temporaries are gigabytes, and getting them page by page anew costs a tenth of its time. Memory for all
    threads comes from one place, the only one that large blocks are kept in. Elsewhere than in glibc nothing happens.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
            mallopt(setting, value)


def give_back_freed_memory() -> None:
    """Undoes that for the moment, before something else than JAX wants as much."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _flag_error(error: Exception, argv: list[str]) -> str:
    """One sentence for what absl and ml_collections raise while they read the command line."""
    if isinstance(error, flags.UnrecognizedFlagError):
        names = [f'--{name}' for name in flags.FLAGS if len(name) > 1]
        return str(unknown('flag', f'--{error.flagname}', names)) if names else str(error)
    for cause in _chain(error):
        # ml_collections wraps what a config file raises in a traceback.
        if isinstance(cause, UsageError) and not str(cause).startswith('Error whilst parsing'):
            return str(cause)
    if 'config' in flags.FLAGS:
        problem = _misspelt_field(argv)
        if problem:
            return problem
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    missing = re.match(r'flag --(\w+)=None: .*must have a value', text)
    if missing:
        holder = flags.FLAGS[missing[1]]
        return f'--{holder.name} is missing: {holder.help}'
    return text or f'cannot read the flags {" ".join(argv[1:])}'


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _given_config(argv: list[str]) -> str | None:
    given = [arg.split('=', 1)[1] for arg in argv if re.match(r'--?config=', arg)]
    given += [b for a, b in itertools.pairwise(argv) if re.fullmatch(r'--?config', a)]
    return given[0] if given else None


def _missing_config(argv: list[str]) -> str | None:
    """The sentence for a config file that does not exist, which ml_collections notices late."""
    given = _given_config(argv)
    if given is None or 'config' not in flags.FLAGS or (file := Path(given.split(':', 1)[0])).is_file():
        return None
    near = [str(path) for path in file.parent.glob('*.py')]
    return str(unknown('config file', str(file), near)) if near else f'there is no config file {file}'


def _misspelt_field(argv: list[str]) -> str | None:
    """The sentence for a `--config.field` that the config lacks; None if it has all that are given."""
    given = _given_config(argv)
    if given is None:
        return None
    config = flags.FLAGS['config'].parser.parse(given)
    for arg in argv:
        found = re.match(r'--?(?:no)?config\.([^=]+)', arg)
        problem = found and _field_problem(config, found[1])
        if problem:
            return problem
    return None


def _field_problem(config: ConfigDict, path: str) -> str | None:
    """The sentence for a field that the config lacks, with the nearest ones; None if it has it."""
    node, above = config, '--config'
    for name in path.split('.'):
        if not isinstance(node, ConfigDict):
            return f'{above} is a value, not a group of fields: there is no --config.{path}'
        if name not in node:
            fields = [f'{above}.{near}' for near in difflib.get_close_matches(name, list(node), n=2, cutoff=0.5)]
            fields += [full for full in _fields(config) if full.rsplit('.', 1)[-1] == path.rsplit('.', 1)[-1]]
            known = f'did you mean {" or ".join(dict.fromkeys(fields))}?' if fields else ''
            return f'unknown field --config.{path}: ' + (known or f'{above} has {", ".join(sorted(node))}.')
        node, above = node[name], f'{above}.{name}'
    return None


def _fields(config: ConfigDict, above: str = '--config') -> Iterator[str]:
    for name in config:
        yield f'{above}.{name}'
        if isinstance(config[name], ConfigDict):
            yield from _fields(config[name], f'{above}.{name}')


class ImageCounter:
    """Images done, on stderr: a bar on a terminal, elsewhere a plain line every few seconds.

    Args:
      total: how many images there are.
      every_seconds: distance of plain lines.
    """

    def __init__(self, total: int, every_seconds: float = 10.0):
        self.total, self.done, self.every = total, 0, every_seconds
        self.printed = time.perf_counter()
        self.bar = tqdm(total=total, unit='image', dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        """Tells that `count` more images are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.perf_counter() - self.printed > self.every:
            self.printed = time.perf_counter()
            print(f'{self.done} of {self.total} images', file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()
