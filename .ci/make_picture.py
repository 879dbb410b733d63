"""Draw docs/grpo.png, README's picture of how GRPO works: python .ci/make_picture.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"  # Okabe & Ito
rewards = [2.5, 0.5, 0.5, 2.5, 0.4, 2.5, 0.5, 0.0]
mean = sum(rewards) / len(rewards)
advantages = [reward - mean for reward in rewards]
group = range(1, len(rewards) + 1)

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.2))
left.bar(group, rewards, color=BLUE)
left.axhline(mean, color=ORANGE, linestyle="--", label=f"the group's mean, {mean:.2f}")
left.set(title="1. One question, 8 completions: rewards", xlabel="completion", ylim=(0, 3.2))
left.legend()
middle.bar(group, advantages, color=[BLUE if value > 0 else RED for value in advantages])
middle.axhline(0, color="black", linewidth=0.8)
middle.set(title="2. Less the mean: advantages", xlabel="completion")
ratios = [i / 100 for i in range(50, 151)]
for advantage, color, label in ((1, BLUE, "advantage +1"), (-1, RED, "advantage −1")):
    gains = [min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratios]
    right.plot(ratios, gains, color=color, label=label)
right.axvspan(0.8, 1.2, color="gray", alpha=0.15)
right.set(title="3. What a token's probability can gain, clipped", ylabel="objective",
          xlabel="its probability, now / when it was written (ε = 0.2)")
right.legend(fontsize=8)
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(Path(__file__).resolve().parent.parent / "docs/grpo.png", dpi=100)
