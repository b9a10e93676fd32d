"""Rewards: what turns a conversation and an answer into one number per attribute."""
