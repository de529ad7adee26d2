"""conversion.align or conversion.finetune as one of several processes on the CPU, with what only tests need.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml tests/launched/train_launched.py align RECIPE.yaml ...

TEST_POISON=R: in process R alone, the loss of the second step's first micro-batch is not finite.
TEST_FAIL=N: every process fails at the end of step N.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from conversion import align, finetune
from conversion.training.trainer import BMojoTrainer, StopAfterStep


def offer_fsdp_on_the_cpu() -> None:
    """accelerate offers FSDP on GPUs only, although FSDP2 itself runs on the CPU: its list of devices is passed by."""
    made = PartialState.__init__

    def build(self, *arguments, **options):
        made(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    PartialState.__init__ = build


def poison(rank: int) -> None:
    compute, steps = BMojoTrainer.compute_loss, []

    def poisoned(self, *arguments, **options):
        found = compute(self, *arguments, **options)
        steps.append(self.state.global_step)
        bad = self.args.process_index == rank and steps[-1] == 1 and steps.count(1) == 1
        return found * float("nan") if bad else found

    BMojoTrainer.compute_loss = poisoned


def fail_at(step: int) -> None:
    done = StopAfterStep.on_step_end

    def failing(self, args, state, control, **options):
        done(self, args, state, control, **options)
        if state.global_step == step:
            raise OSError("the disk is gone")

    StopAfterStep.on_step_end = failing


def main(program: str, *arguments: str) -> int:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        offer_fsdp_on_the_cpu()
    if "TEST_POISON" in os.environ:
        poison(int(os.environ["TEST_POISON"]))
    if "TEST_FAIL" in os.environ:
        fail_at(int(os.environ["TEST_FAIL"]))
    return {"align": align, "finetune": finetune}[program].main(arguments)


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():  # the launcher ends the others as soon as one process has failed
        torch.distributed.barrier()
    # Nothing is taken down: torch joins gloo's threads while it holds the GIL, which now and then never ends.
    os._exit(status)
