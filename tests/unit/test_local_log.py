"""What is left of KFP's account of a local run."""

import io

from pipelines.local_log import LocalLog

ACCOUNT = """\
05:51:00.000 - INFO - Executing task \x1b[96m'train-teacher'\x1b[0m
05:51:00.001 - INFO - Streamed logs:

{0}[KFP Executor 2026-11-27 05:51:01,767 INFO]: Looking for component `train_teacher` in `/tmp/x.py`
{0}[KFP Executor 2026-11-27 05:51:01,769 INFO]: Got executor_input:
{0}{{
{0}    "inputs": {{
{0}    }}
{0}}}
{0}iteration 200, teacher: validation mIoU 51.66 %
{0}[KFP Executor 2026-11-27 05:51:09,548 INFO]: Wrote executor output file to /tmp/executor_output.json.
05:51:12.000 - INFO - Task \x1b[96m'train-teacher'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
05:51:12.001 - INFO - Task \x1b[96m'train-teacher'\x1b[0m outputs:
    scores: Metrics( name='scores',
                     metadata={{'test/miou': 0.06}} )
--------------------------------------------------------------------------------
05:51:12.002 - INFO - Executing task \x1b[96m'finish'\x1b[0m
{0}no more disk
05:51:13.002 - ERROR - Task \x1b[96m'finish'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
half a line"""


def kept(prefix: str, size: int) -> list[str]:
    out, times = io.StringIO(), iter([0.0, 12.0, 20.0, 21.0])
    log, text = LocalLog(out, lambda: next(times)), ACCOUNT.format(prefix)
    for start in range(0, len(text), size):
        log.write(text[start : start + size])
    log.close()
    return out.getvalue().splitlines()


def test_tasks_their_times_and_what_they_say_are_left_of_a_local_run() -> None:
    for prefix in ("    ", "train_teacher | "):  # processes, containers
        expected = [
            "train-teacher ...",
            f"{prefix}iteration 200, teacher: validation mIoU 51.66 %",
            "train-teacher: done in 12 s",
            "finish ...",
            f"{prefix}no more disk",
            "finish: FAILURE in 1 s",
            "half a line",
        ]
        assert [kept(prefix, size) for size in (1, 7, 10_000)] == [expected] * 3
