"""Train the gates of a learned method, over as many processes as are launched: the program is learnevict/train/distill.py.

    python recipes/distill.py --method foresightkv --output_dir runs/foresightkv
    python recipes/distill.py --method foresightkv --help                    # flags of its trainer and gate
    python recipes/distill.py config.yaml --max_steps 100                    # flags from a file, others after it
    accelerate launch recipes/distill.py --labels runs/labels --output_dir runs/foresightkv
    python recipes/distill.py --model Qwen/Qwen3-0.6B --data user/chats --streaming --packed --max_length 2048
    python recipes/distill.py --method judge_q --own_answers true --output_dir runs/judge_q

An installed package has it as `learnevict train METHOD`.
"""

import sys

from learnevict.errors import told_in_one_line
from learnevict.train.distill import main, parse

if __name__ == "__main__":
    with told_in_one_line("with a checkpoint in --output_dir, --resume_from_checkpoint true goes on"):
        main(parse(sys.argv[1:]))
