"""torchrun, but a user's mistake stays one sentence.

Same arguments and behaviour. When a rank ends with the exit code of a UserError it has already
printed its sentence, and torchrun's own report (a traceback of the launcher) would bury it.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_vrl.errors import EXIT_CODE


def run() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the ranks: finish the step and stop
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == EXIT_CODE:
            return EXIT_CODE
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run())
