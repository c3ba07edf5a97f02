"""Does the jobs of a Worker: one line of JSON each on stdin, rows and an end on stdout. Libraries print to stderr."""

import importlib
import json
import os
import sys
import traceback
from typing import Any

# job -> the module whose function `do` yields its rows; imported when it is asked for, as its packages may be missing
JOBS = {
    "machine": "on_gpu.machine",
    "assumptions": "on_gpu.assumptions",
    "numbers": "on_gpu.numbers_of_card",
    "blocks": "on_gpu.blocks",
    "native": "on_gpu.native",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    for line in sys.stdin:
        job = json.loads(line)
        try:
            for row in importlib.import_module(JOBS[job["do"]]).do(job):
                say({"row": row})
            say({"done": True})
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines()
            say({"error": f"{type(error).__name__}: {said[0] if said else 'no message'}"})


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are on_gpu's
    main()
