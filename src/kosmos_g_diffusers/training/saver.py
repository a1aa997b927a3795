"""Saving a run and going on with it: accelerate's training state beside what `from_pretrained` reads."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import checkpoints

TRAINED = "trained.safetensors"
# what a full disk raises: Python's own writes, safetensors', torch.save's
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


class Saver:
    """Writes and reads the checkpoints of one run.

    Args:
        config: TrainConfig.
        accelerator: accelerate.Accelerator, which has prepared the stage and the optimizer.
        wrapped: the stage as it came back from there.
        stage: the stage itself.
        ema: diffusers' EMAModel over the trained weights, or None.
        save_model: called with (folder, state_dict) on the main process.
    """

    def __init__(self, config, accelerator, wrapped, stage, ema, save_model):
        self.config, self.run, self.accelerator = config, Path(config.output), accelerator
        self.wrapped, self.stage, self.ema, self.save_model = wrapped, stage, ema, save_model
        self._keep_trained_weights_only()

    def trained_parameters(self):
        return [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]

    @contextmanager
    def averaged_weights(self):
        """Context in which the stage has the averaged weights, if there is an average; its own come back unchanged."""
        if self.ema is None:
            yield
            return
        parameters = self.trained_parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save(self, step, skips):
        """Write the checkpoint of a step, whole or not at all, and remove older ones.

        Raises:
            OSError: it cannot be written, with the last good checkpoint.
        """
        accelerator, partial = self.accelerator, checkpoints.partial_folder(self.run, step)
        try:
            if accelerator.is_main_process:
                (partial / checkpoints.STATE).mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / checkpoints.STATE))
            with self.averaged_weights():
                state = accelerator.get_state_dict(
                    self.wrapped
                )  # of all processes, where weights are sharded
                if accelerator.is_main_process:
                    self.save_model(partial, state)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                progress = {"step": step, "skips": skips.state_dict(), "processes": accelerator.num_processes}
                checkpoints.write_progress(partial, progress)
                checkpoints.publish(partial, checkpoints.checkpoint_folder(self.run, step))
                checkpoints.prune(self.run, self.config.keep_checkpoints)
        except WRITE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"Checkpoint {step:,} could not be written to {self.run}: {error}. {self.last_good()} If the disk is full, "
                "make room and run the same command again."
            ) from error
        accelerator.wait_for_everyone()

    def resume(self, skips):
        """Load the newest checkpoint, if there is one.

        Returns:
            The step it was saved after; 0 if there is none.

        Raises:
            ValueError: it was written by another number of processes.
        """
        found = checkpoints.list_checkpoints(self.run)
        if not found:
            return 0
        progress = checkpoints.read_progress(found[-1])
        if progress["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The run in {self.run} was begun on {progress['processes']} processes; this one has "
                f"{self.accelerator.num_processes}. Go on with as many, or give a new run another --output."
            )
        self.accelerator.load_state(str(found[-1] / checkpoints.STATE))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # it is read to the CPU
        skips.load_state_dict(progress["skips"])
        return progress["step"]

    def last_good(self):
        """A sentence that names the newest checkpoint."""
        found = checkpoints.list_checkpoints(self.run)
        return f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."

    def _keep_trained_weights_only(self):
        """Have accelerate save and load the weights that train, not the frozen rest, which is there already.

        FSDP and DeepSpeed save theirs in formats of their own.
        """
        accelerator = self.accelerator
        trained = {name for name, parameter in self.stage.named_parameters() if parameter.requires_grad}

        def save(models, weights, folder):
            if weights and accelerator.is_main_process:
                state = {name.removeprefix("module."): tensor for name, tensor in weights[0].items()}
                save_file({name: state[name].contiguous() for name in trained}, Path(folder) / TRAINED)
            weights.clear()

        def load(models, folder):
            if models:
                state = load_file(Path(folder) / TRAINED)
                assert set(state) == trained, "the stage trains other weights than the checkpoint holds"
                accelerator.unwrap_model(models[0]).load_state_dict(state, strict=False)
            models.clear()

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
