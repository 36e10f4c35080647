"""Key names of verl and TRL, and the equivalent keys of this project."""

# Keys of verl are the last two parts of a name in its ppo_trainer.yaml. Keys of TRL are fields of
# GRPOConfig.
FOREIGN = {
    "algorithm.adv_estimator": "algorithm.name",
    "actor.kl_loss_coef": "algorithm.kl",
    "actor.kl_loss_type": "algorithm.kl_estimator",
    "actor.clip_ratio": "algorithm.clip",
    "actor.clip_ratio_high": "algorithm.clip_high",
    "actor.entropy_coeff": "algorithm.entropy",
    "actor.loss_agg_mode": "algorithm.normalisation",
    "actor.ppo_epochs": "grpo.epochs",
    "actor.ppo_mini_batch_size": "grpo.mini_batches",
    "optim.lr": "grpo.optimizer.lr",
    "rollout.n": "rollout.group_size",
    "rollout.gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "rollout.tensor_model_parallel_size": "rollout.tensor",
    "rollout.response_length": "rollout.max_response_tokens",
    "model.path": "model.checkpoint",
    "data.train_files": "data.train",
    "data.val_files": "data.evaluation",
    "data.train_batch_size": "rollout.prompts_per_step",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "trainer.total_training_steps": "grpo.steps",
    "trainer.test_freq": "grpo.evaluate_every",
    "trainer.save_freq": "checkpoint.every_steps",
    "trainer.project_name": "observe.project",
    "trainer.default_local_dir": "run.out_dir",
    "num_generations": "rollout.group_size",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "beta": "algorithm.kl",
    "epsilon": "algorithm.clip",
    "epsilon_high": "algorithm.clip_high",
    "loss_type": "algorithm.normalisation",
    "num_iterations": "grpo.epochs",
    "learning_rate": "grpo.optimizer.lr",
    "max_grad_norm": "grpo.optimizer.clip_grad",
    "max_steps": "grpo.steps",
    "eval_steps": "grpo.evaluate_every",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "run.out_dir",
    "model_name_or_path": "model.checkpoint",
}


def equivalent_key(key: str) -> str:
    """Return the key that is equivalent to `key` of verl or TRL; "" if none is known."""
    *_, section, name = ["", *key.split(".")]
    return FOREIGN.get(f"{section}.{name}") or FOREIGN.get(name, "")
