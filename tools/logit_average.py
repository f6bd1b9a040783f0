"""Val loss of a finished run's members averaged in logits, beside their mixture of probabilities.

    python tools/logit_average.py runs/ID

For comparison only: the average of logits needs all members at once, and the public project found
it worse by 0.011 (slowrun #55). All members take part, with equal weights.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from _runs import load_logp, load_member, probabilities, read_result, run_tool
from train_gpt import (dataset_folder, load_dataset, mean_loss, mixture_logp,
                       start_runtime)


@torch.no_grad()
def logit_average(models, inputs, targets):
    """log p(target) [B, T] of softmax(mean of the models' logits)."""
    logits = sum(probabilities(model, inputs).log() for model in models) / len(models)
    targets = targets.cpu()
    return torch.log_softmax(logits, dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    result, config = read_result(run)
    runtime = start_runtime(config)
    data = load_dataset(dataset_folder(config), config)
    numbers = range(1, 1 + len(result["members"]))
    models = [load_member(run, number, config, runtime) for number in numbers]
    tokens = torch.from_numpy(np.concatenate(data.scored["val"]).astype(np.int64))
    count = (len(tokens) - 1) // config.seq_len * config.seq_len        # whole rows
    inputs = tokens[:count].view(-1, config.seq_len).to(runtime.device)
    targets = tokens[1:count + 1].view(-1, config.seq_len).to(runtime.device)
    size = config.device_batch_size
    parts = [logit_average(models, x, y) for x, y in zip(inputs.split(size), targets.split(size))]
    logps = [load_logp(run, number)[0]["val"][:count] for number in numbers]
    print(f"{len(models)} members, whole rows of val: average of logits"
          f" {-float(torch.cat(parts).mean()):.4f}, mixture of probabilities"
          f" {mean_loss(mixture_logp(logps)):.4f}")


if __name__ == "__main__":
    run_tool(main)
