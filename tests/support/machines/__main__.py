"""`python tests/support/machines TABLE`: visit all machines of the product, write how each ended.

Exit status 1 when one failed. Rows are written as they come, so that an interrupted run shows how
far it came.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machines


def main(table: Path) -> int:
    # Two visits share the cores, and threads that wait for their share would double the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def row(machine: dict[str, str]) -> tuple[dict[str, str], str]:
        why_not = machines.beyond(machine)
        if why_not is not None:
            return machine, f"not tried: {why_not}"
        start = time.monotonic()
        problem = machines.visit(machine, model).problem
        print(
            f"{time.monotonic() - start:5.1f} s  {machines.title(machine)}  {problem}", flush=True
        )
        return machine, problem or "passed"

    with tempfile.TemporaryDirectory() as folder, table.open("w", encoding="utf-8") as file:
        model = machines.tiny_model(Path(folder))
        file.write("\t".join([*machines.TRAITS, "dtype", "outcome"]) + "\n")
        failed = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for machine, outcome in pool.map(row, machines.full()):
                failed += not outcome.startswith(("passed", "not tried"))
                file.write("\t".join([*machine.values(), " ".join(outcome.split())]) + "\n")
                file.flush()
    print(f"{len(machines.full())} machines, {failed} failed: {table}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
