"""Reinforcement learning towards requested levels.

    driver      rollouts.py   step k: prompts and settings -> engines -> rewards -> table of rollouts ─┐
                   ▲ weights, version k                                                                ▼
    workers     loop.py       policy.py: log-probs, advantages, PPO epochs ◄── rollouts/step-k.parquet

Both sides meet in storage: a table of rollouts and a file of weights are complete when they are there, so whichever side is
killed goes on from what lies there. Only between GPUs do weights go past it (handover.py), when the engines ask for them.
"""
