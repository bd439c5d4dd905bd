"""The words of the decision tree, in English and in Chinese side by side."""

from __future__ import annotations

from typing import Final

# Each entry: (English, Chinese).
QUESTIONS: Final = {
    "nan": ("NaN or infinity?", "是否出现 NaN？"),
    "enough": ("Enough epochs to tell?", "epoch 数是否足以判断？"),
    "falling": ("Does the loss fall, and fast enough?", "Loss 是否（足够快地）下降？"),
    "enough_rate": ("Is it only the epochs that ran out?", "是否只是 epoch 不够？"),
    "rate": ("Is the rate already high?", "学习率是否已经偏高？"),
    "oscillating_or_overfitting": ("Oscillating or overfitting?", "是否震荡/过拟合？"),
}

LEAVES: Final = {
    "non_finite": ("check the dtype (float32) and gradient clipping", "检查数据类型 (float32) + 梯度裁剪"),
    "undecided": ("run more epochs before judging", "先多训练几个 epoch 再判断"),
    "rate_too_high": ("lower the learning rate", "降低学习率"),
    "longer": ("train more epochs", "增加 epoch 数"),
    "not_falling": ("raise the learning rate / the LoRA rank", "提高学习率 / 增加 LoRA rank"),
    "unstable": ("lower the learning rate / regularise more", "降低学习率 / 增加正则化"),
    "good": ("no fault seen", "未见问题"),
}
