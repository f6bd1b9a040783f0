"""Val loss of a finished run's members averaged in logits, beside their mixture of probabilities.

    python records/logit_average.py runs/ID

For comparison only: the average of logits needs all members at once, and the public project found
it worse by 0.011 (slowrun #55). The members are those of the run's ensemble, with equal weights.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def logit_average(models, inputs, targets):
    """log p(target) [B, T] of softmax(mean of the models' softcapped logits)."""
    logits = sum(model.logits(model(inputs)).double() for model in models) / len(models)
    return torch.log_softmax(logits, dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)


def main(folder):
    sys.path.insert(0, str(ROOT))
    import train_gpt as t
    result, c = t.report.finished_run(t, folder)
    rt, data = t.start_runtime(c), t.load_dataset(ROOT / c.dataset, c)
    models = [t.report.load_member(t, c, rt, data, folder, point["member"])
              for point in result["ensemble"]]
    tokens = torch.from_numpy(np.concatenate(data.val).astype(np.int64))
    count = (len(tokens) - 1) // c.seq_len * c.seq_len      # whole rows
    inputs, targets = tokens[:count].view(-1, c.seq_len), tokens[1:count + 1].view(-1, c.seq_len)
    parts = [logit_average(models, x.to(rt.device), y.to(rt.device)) for x, y in zip(
        inputs.split(c.device_batch_size), targets.split(c.device_batch_size))]
    logps = [load_file(folder / "members" / f"{point['member']:03d}.logp.safetensors")["val"]
             [:count].numpy() for point in result["ensemble"]]
    print(f"{len(models)} members, val: average of logits {-float(torch.cat(parts).mean()):.4f},"
          f" mixture of probabilities {t.mean_loss(t.mixture_logp(logps)):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
