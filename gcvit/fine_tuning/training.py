"""A training run that can be cut off and goes on where it was."""

import collections.abc
import dataclasses
import json
import re
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from gcvit.checks import labels_within, not_normalized
from gcvit.fast import device_kinds
from gcvit.weights import replacing


def accelerator():
    """Return "gpu" or "tpu" where Keras's backend computes on one, else `None`."""
    kinds = device_kinds()
    return "tpu" if "tpu" in kinds else "gpu" if "gpu" in kinds else None


def jit_compile():
    """Return `Model.compile`'s `jit_compile`: off for TensorFlow on a CPU, else Keras's choice.

    There XLA, the compiler that it turns on, is slow at depthwise convolutions.
    """
    return "auto" if accelerator() or keras.backend.backend() != "tensorflow" else False


def precision():
    """Return what to compute in here: a mixed precision on an accelerator, else "float32"."""
    return {"gpu": "mixed_float16", "tpu": "mixed_bfloat16", None: "float32"}[accelerator()]


class BackupError(ValueError):
    """The state of a training run cannot be read, or is another run's."""


class DivergenceError(ValueError):
    """A training has diverged: its loss is no longer a finite number."""


class TrainingState(keras.callbacks.Callback):
    """Keeps the best epoch's weights and, in a file, all that a run that is cut off needs.

    The file is replaced as a whole after each epoch: the weights, those of the best epoch,
    the optimizer's and the random generators' state, and the numbers so far. Where the
    optimizer averages the weights, the averages are what is validated and kept. An epoch with
    a loss that is not finite ends the run and leaves no trace.

    Keras has a callback for each of the three. Together they lose the best weights when a
    run is cut off, and can be cut off themselves between two files.

    Args:
        model: a compiled model, whose optimizer is built.
        run: what must be the same for a run to go on: a dict of JSON's types.
        file: where the state is kept; default `None`: nowhere.
        patience: epochs without a lower validation loss after which the run ends; default
            `None`: it does not.
        leave_best: whether the model has the best epoch's weights at the end; default
            `True`; else the last epoch's.
    """

    def __init__(self, model, run, file=None, patience=None, leave_best=True):
        super().__init__()
        self.set_model(model)
        self.run = json.loads(json.dumps(run))
        self.file = Path(file) if file else None
        self.patience = patience
        self.leave_best = leave_best
        self.logs = []
        self.best_epoch, self.best_weights = None, None
        self.trained = None  # the weights that are trained on, while averages stand in
        self.on_best = None  # called after an epoch that is the best so far
        self.interrupted, self.diverged = False, None

    @property
    def history(self):
        """The numbers of each epoch so far: {name: list}."""
        return {name: [logs[name] for logs in self.logs] for name in (self.logs or [{}])[0]}

    @property
    def ended(self):
        """Whether the patience is at its end."""
        waited = len(self.logs) - 1 - (self.best_epoch or 0)
        return self.patience is not None and waited >= self.patience

    def variables(self):
        """Return the variables that a run goes on from."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def resume(self):
        """Go on from the file, where there is one.

        Raises:
            BackupError: if the file is damaged or another run's; nothing is changed.
        """
        if self.file is None or not self.file.exists():
            return
        way_out = "To start anew, delete it; to keep it, name another folder."
        try:
            with np.load(self.file) as arrays:
                notes = json.loads(str(arrays["notes"]))
                values, best = (
                    [_typed(arrays[f"{part}{i}"], *each) for i, each in enumerate(notes[part])]
                    for part in ("state", "best")
                )
                run, logs, best_epoch = (notes[name] for name in ("run", "logs", "best_epoch"))
        except Exception as error:  # whatever a damaged file raises
            raise BackupError(f"{self.file} cannot be read ({error}). {way_out}") from error
        difference = _difference(run, self.run, notes["state"], describe(self.variables()))
        if difference:
            raise BackupError(f"{self.file} belongs to another run: {difference}. {way_out}")
        assign(self.variables(), values)
        self.logs, self.best_epoch = logs, best_epoch
        self.best_weights = best or None

    def write(self):
        """Write what `resume` reads."""
        state, best = values_of(self.variables()), self.best_weights or []
        notes = {"run": self.run, "logs": self.logs, "best_epoch": self.best_epoch}
        notes |= {"state": describe(self.variables())}
        notes |= {"best": describe(self.model.weights) if best else []}
        arrays = {f"state{i}": value for i, value in enumerate(state)}
        arrays |= {f"best{i}": value for i, value in enumerate(best)}
        write_whole(self.file, notes=json.dumps(notes), **arrays)

    def restore_best(self):
        """Give the model the best epoch's weights, if an epoch has been finished."""
        if self.best_weights is not None:
            self.model.set_weights(self.best_weights)

    def take_averages(self):
        """Have the averages stand in for the weights that are trained on, if there are any."""
        variables = self.model.trainable_variables
        self.trained = values_of(variables)
        self.model.optimizer.finalize_variable_values(variables)

    def return_trained(self):
        """Undo `take_averages`, if it was called."""
        if self.trained is not None:
            assign(self.model.trainable_variables, self.trained)
            self.trained = None

    def on_test_begin(self, logs=None):
        self.take_averages()

    def on_epoch_end(self, epoch, logs=None):
        logs = {name: float(value) for name, value in (logs or {}).items()}
        if "val_loss" not in logs:
            raise ValueError(
                f"Epoch {epoch + 1} was not validated, and the epoch with the lowest val_loss is "
                "kept: pass validation_data, and leave validation_freq out."
            )
        broken = [name for name in ("loss", "val_loss") if not np.isfinite(logs[name])]
        if broken:
            self.diverged = f"in epoch {epoch + 1} the {broken[0]} is {logs[broken[0]]}"
            self.model.stop_training = True
            return
        self.logs.append(logs)
        losses = self.history["val_loss"]
        if losses[-1] <= min(losses):
            self.best_epoch, self.best_weights = epoch, self.model.get_weights()
            if self.on_best:
                self.on_best()
        self.return_trained()
        if self.file:
            self.write()
        if self.ended:  # never set to False: another callback may have ended the run
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        if self.leave_best:
            self.restore_best()


def _typed(array, path, shape, dtype, *_):
    """Return an array of a backup with the type that it had: `.npz` knows only NumPy's own."""
    if array.shape != tuple(shape):
        raise ValueError(f"{path} has shape {array.shape}, not {tuple(shape)}")
    return array.view(getattr(ml_dtypes, dtype)) if array.dtype.kind == "V" else array


def describe(variables):
    """Return [path, shape, dtype, whether it is trained] of each variable, as JSON's types."""
    return [[v.path, list(v.shape), v.dtype, bool(v.trainable)] for v in variables]


def _difference(run, run_here, variables, variables_here):
    """Say in what another run, and its variables, differ from these; `None` if in nothing."""
    for name, here in run_here.items():
        if run.get(name) != here:
            return f"its {name} is {run.get(name)}, here it is {here}"
    for (path, *there), (path_here, *here) in zip(variables, variables_here, strict=False):
        # Keras numbers what has no name of its own, in each process anew.
        if re.sub(r"_?\d+", "", path) != re.sub(r"_?\d+", "", path_here):
            return f"it has {path} where {path_here} is here"
        for what, theirs, ours in zip(("shape", "dtype", "trainable"), there, here, strict=True):
            if theirs != ours:
                return f"the {what} of its {path_here} is {theirs}, here it is {ours}"
    if len(variables) != len(variables_here):
        return f"it has {len(variables)} variables, here there are {len(variables_here)}"
    return None


def values_of(variables):
    """Return copies of the values of variables, for `assign`."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assign(variables, values):
    """Give variables the values that `values_of` returned."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def write_whole(file, **arrays):
    """Write arrays as `.npz`; the file is whole or the one before, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished, open(unfinished, "wb") as stream:
        np.savez(stream, **arrays)


@dataclasses.dataclass
class Run:
    """A training run, ready for `fit`.

    Attributes:
        batches: function of an epoch's number that returns the batches of all epochs from it.
        validation: batches to validate on.
        epochs: passes over them.
        steps: batches of an epoch.
        state: its `TrainingState`.
    """

    batches: collections.abc.Callable[[int], tf.data.Dataset]
    validation: tf.data.Dataset
    epochs: int
    steps: int
    state: TrainingState


DECIDED = {"x", "y", "batch_size", "epochs", "initial_epoch", "steps_per_epoch", "shuffle"}
DECIDED |= {"validation_data", "validation_split", "validation_freq", "validation_batch_size"}
"""The arguments of `keras.Model.fit` that a recipe has decided."""


def fit(model, run, verbose="auto", callbacks=(), on_best=None, **kwargs):
    """Train a model, from where the run was cut off if it was.

    An interrupt (Ctrl-C, or the notebook's stop button) ends the run with the weights of
    the best epoch; the backup stays, and the next call goes on from it. A run that ends by
    itself removes its backup. One that diverges ends with an error, and the model with the
    best weights before.

    Args:
        model: a model that a recipe has prepared.
        run: what the recipe returned: a `Run`.
        verbose: see `keras.Model.fit`; default "auto".
        callbacks: more of them. What they add to the logs of an epoch is kept with the rest.
        on_best: function without arguments that is called after each epoch that is the best
            so far, with its weights in the model; default `None`.
        **kwargs: what else `keras.Model.fit` takes, such as `class_weight`, but for what the
            recipe has decided.

    Returns:
        Loss and metrics after each epoch, those before a cut too: {name: list}.

    Raises:
        ValueError: before anything is trained, if the images are not normalized or the labels
            are of other classes than the model's.
        TypeError: for an argument of `keras.Model.fit` that the recipe has decided.
        BackupError: if the backup is damaged or another run's.
        DivergenceError: if the loss of an epoch is not a finite number.
    """
    decided = sorted(DECIDED & set(kwargs))
    if decided:
        raise TypeError(
            f"fit does not take {', '.join(decided)}: the recipe has decided that. Give the recipe "
            "the epochs and the batch size; each epoch is validated, for the best one is kept."
        )
    images, labels, *_ = next(run.validation.take(1).as_numpy_iterator())
    check_batch(model, images, labels)
    state = run.state
    state.on_best, state.interrupted, state.diverged = on_best, False, None
    state.resume()
    start = model.get_weights()
    done = len(state.logs)
    if done:
        print(f"Going on after epoch {done} of {run.epochs}.")
    try:
        if done < run.epochs and not state.ended:
            try:
                model.fit(
                    run.batches(done),
                    validation_data=run.validation,
                    epochs=run.epochs,
                    initial_epoch=done,
                    steps_per_epoch=run.steps,
                    callbacks=[*callbacks, state],
                    shuffle=False,  # the batches are shuffled already
                    verbose=verbose,
                    **kwargs,
                )
            finally:
                state.return_trained()
        else:
            state.on_train_end()
    except KeyboardInterrupt:
        state.interrupted = True
        state.restore_best()
        best = state.best_epoch
        has = "those it had then" if best is None else f"those of epoch {best + 1}"
        print(f"\nInterrupted after {len(state.logs)} epochs; the weights are {has}.")
    else:
        if state.file:
            state.file.unlink(missing_ok=True)
    if state.diverged:
        model.set_weights(start if state.best_weights is None else state.best_weights)
        best = state.best_epoch
        has = "those it began with" if best is None else f"those of epoch {best + 1}"
        raise DivergenceError(
            f"The training has diverged: {state.diverged}. The model's weights are {has}, the last "
            "good ones; train with a lower learning rate, or from pretrained weights."
        )
    return state.history


def check_batch(model, images, labels):
    """Raise a `ValueError` if a model cannot be trained on such a batch.

    Args:
        model: a model that gives probabilities.
        images: array (batch, height, width, channels).
        labels: array (batch,) of integers, or one-hot (batch, classes).
    """
    sentence = not_normalized(images)
    if sentence:
        raise ValueError(sentence)
    classes = model.compute_output_shape(images.shape)[-1]
    if labels.ndim == 2 and labels.shape[-1] != classes:
        raise ValueError(
            f"The labels have {labels.shape[-1]} classes, but the model has {classes}."
        )
    if labels.ndim == 1:
        labels_within(labels, classes)


def make_variables(model, labels, classes):
    """Make the variables of a compiled model's optimizer and metrics.

    By default, they are created in the first step. TensorFlow then traces the step twice, which
    takes longer than many steps; and a backup can be read only into variables that exist.

    Args:
        model: a compiled model.
        labels: labels of one image, as they come in batches: an integer or a row.
        classes: number of classes.

    Raises:
        ValueError: if the model has no weights yet to make them for.
    """
    if not model.built:
        raise ValueError(
            "The model has no weights yet, so nothing can be trained. Build it first: "
            "model.build((None, height, width, 3))."
        )
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, labels, np.zeros((1, classes), "float32"))
    model.reset_metrics()
