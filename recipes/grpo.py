"""Refine gates by GRPO, over as many processes as are launched: the program is learnevict/rl/refine.py.

    python recipes/grpo.py --start_from runs/foresightkv --output_dir runs/refined
    python recipes/grpo.py --share_spread 0.3 --output_dir runs/shares        # layers learn to share the budget
    python recipes/grpo.py --scope model --output_dir runs/together           # slots of all heads and layers compete
    python recipes/grpo.py config.yaml --max_steps 100                        # flags from a file, others after it
    accelerate launch recipes/grpo.py --start_from runs/foresightkv --output_dir runs/refined

An installed package has it as `learnevict refine`.

The gates that ship as testbed-foresightkv were made by two runs, the second for what larger budgets had lost (together three
quarters of an hour on a core):

    python recipes/grpo.py --share_spread 0.3 --min_budget 22 --max_budget 96 --max_steps 400 --output_dir runs/refined \
        --families program,ledger,program,recall,program,procedure,program,dialogue
    python recipes/grpo.py --share_spread 0.2 --min_budget 30 --max_budget 120 --max_steps 160 --learning_rate 7e-4 --seed 8 \
        --families program,recall,ledger,recall,program,procedure,dialogue,recall --start_from runs/refined \
        --output_dir runs/refined-again

When they were made, a family named again brought its first texts again; now it brings further ones.
"""

import sys

from learnevict.errors import told_in_one_line
from learnevict.rl.refine import main, parse

if __name__ == "__main__":
    with told_in_one_line("with a checkpoint in --output_dir, --resume_from_checkpoint true goes on"):
        main(*parse(sys.argv[1:]))
