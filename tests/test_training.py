"""A run that is cut off, by whatever, and goes on."""

import dataclasses
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import (
    dark_and_bright,
    plain_model,
    same_weights,
    tiny_model,
    to_numpy,
    weights_of,
)

from gcvit import fine_tuning
from gcvit.fine_tuning import (
    BackupError,
    DivergenceError,
)
from gcvit.fine_tuning.training import make_variables


class At(keras.callbacks.Callback):
    """Does something in the middle of an epoch."""

    def __init__(self, epoch, act):
        super().__init__()
        self.wanted, self.act = epoch, act

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.wanted and batch == 0:
            self.act()


def interrupt():
    raise KeyboardInterrupt


DYING_RUN = """
import os, signal, sys
sys.path[:0] = sys.argv[2].split(os.pathsep)
from test_training import At, dark_and_bright, learning_model, prepared
from gcvit import fine_tuning

model = learning_model(0)
run = prepared(model, dark_and_bright(), sys.argv[1])
die = At(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
fine_tuning.fit(model, run, verbose=0, callbacks=[die])
"""


def learning_model(seed):
    """Build a model in whose training something is random: dropout, as drop path is."""
    keras.utils.set_random_seed(seed)
    return plain_model(drop_rate=0.3)


def prepared(model, photos, backup=None):
    """Return a run whose optimizer averages the weights, as a user's own may."""
    run = fine_tuning.finetune(model, photos, 32, 3, 8, backup=backup)
    optimizer = fine_tuning.adamw(3e-3, use_ema=True, ema_momentum=0.8)
    model.compile(optimizer, model.loss, weighted_metrics=["accuracy"])
    make_variables(model, np.zeros((1, 2)), 2)
    return run


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    """SIGKILL in the middle of an epoch; then the same call again, in another process."""
    photos = dark_and_bright()
    script = [sys.executable, "-c", DYING_RUN, str(tmp_path), os.pathsep.join(sys.path)]
    died = subprocess.run(script, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]

    whole = learning_model(0)
    start = weights_of(whole)
    history = fine_tuning.fit(whole, prepared(whole, photos), verbose=0)
    assert not same_weights(whole, start)

    resumed = learning_model(1)
    run = prepared(resumed, photos, tmp_path)
    counted = []
    counter = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: counted.append(epoch)
    )
    later = fine_tuning.fit(resumed, run, verbose=0, callbacks=[counter])
    assert counted == [1, 2]
    for name, values in history.items():
        np.testing.assert_allclose(later[name], values, atol=1e-6, err_msg=name)
    for ours, theirs in zip(weights_of(resumed), weights_of(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_the_variables_of_a_gcvit_hold_its_random_generators():
    model = tiny_model(path_drop=0.5, drop_rate=0.1)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
    before = [to_numpy(variable) for variable in model.variables]
    first, second = (to_numpy(model(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(to_numpy(model(images, training=True)), first, atol=1e-6)


def test_the_averaged_weights_of_the_best_epoch_are_left(two_classes):
    photos, batches = two_classes
    keras.utils.set_random_seed(0)
    model = plain_model()
    run = prepared(model, photos)
    history = fine_tuning.fit(model, run, verbose=0)
    loss = model.evaluate(batches, verbose=0)[0]
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-4)

    # Timing its steps leaves the model as it is.
    before = weights_of(model), int(model.optimizer.iterations)
    assert fine_tuning.training_speed(model, batches, steps=2) > 0
    assert int(model.optimizer.iterations) == before[1]
    assert same_weights(model, before[0])


def worsening(photos):
    """Return photographs with a validation part on which each epoch does worse."""
    wrong = photos.validation.map(lambda image, label: (image, 1 - label))
    return dataclasses.replace(photos, validation=wrong)


def test_a_run_remembers_its_best_epoch_and_patience_when_it_is_cut_off(two_classes, tmp_path):
    photos = worsening(two_classes[0])
    whole = plain_model()
    start = weights_of(whole)
    run = fine_tuning.finetune(whole, photos, 32, 9, 8, peak=3e-3, patience=3)
    history = fine_tuning.fit(whole, run, verbose=0)
    assert len(history["loss"]) < 9 and int(np.argmin(history["val_loss"])) == 0

    model = plain_model()
    model.set_weights(start)
    run = fine_tuning.finetune(model, photos, 32, 9, 8, backup=tmp_path, peak=3e-3, patience=3)
    with pytest.raises(ZeroDivisionError):
        fine_tuning.fit(model, run, verbose=0, callbacks=[At(2, lambda: 1 / 0)])
    model = plain_model()
    run = fine_tuning.finetune(model, photos, 32, 9, 8, backup=tmp_path, peak=3e-3, patience=3)
    later = fine_tuning.fit(model, run, verbose=0)
    assert later["val_loss"] == pytest.approx(history["val_loss"], rel=1e-5)
    for ours, theirs in zip(weights_of(model), weights_of(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("recipe", ["original", "finetune"])
def test_an_interrupt_leaves_the_best_weights_and_the_backup(two_classes, tmp_path, capsys, recipe):
    photos, _ = two_classes
    model = plain_model()
    run = fine_tuning.RECIPES[recipe](model, photos, 32, 4, 8, backup=tmp_path)
    history = fine_tuning.fit(model, run, verbose=0, callbacks=[At(2, interrupt)])
    assert len(history["loss"]) == 2
    best = int(np.argmin(history["val_loss"]))
    assert f"after 2 epochs; the weights are those of epoch {best + 1}" in capsys.readouterr().out
    loss = model.evaluate(run.validation, verbose=0)[0]
    assert loss == pytest.approx(history["val_loss"][best], rel=1e-4)
    again = fine_tuning.fit(model, run, verbose=0)
    assert len(again["loss"]) == 4 and again["loss"][:2] == history["loss"]


def test_an_interrupt_in_the_first_epoch_leaves_a_usable_model(two_classes, capsys):
    photos, batches = two_classes
    model = plain_model()
    run = fine_tuning.finetune(model, photos, 32, 2, 8)
    assert fine_tuning.fit(model, run, verbose=0, callbacks=[At(0, interrupt)]) == {}
    assert "those it had then" in capsys.readouterr().out
    assert np.isfinite(model.evaluate(batches, verbose=0)[0])


def test_a_backup_of_another_run_or_a_damaged_one_is_refused(two_classes, tmp_path):
    photos, _ = two_classes

    def attempt(epochs=4, **settings):
        model = plain_model()
        run = fine_tuning.finetune(model, photos, 32, epochs, 8, backup=tmp_path, **settings)
        fine_tuning.fit(model, run, verbose=0, callbacks=[At(1, interrupt)])

    attempt()
    with pytest.raises(
        BackupError, match=r"run\.npz belongs to another run: its epochs is 4, here .* 5"
    ):
        attempt(5)
    with pytest.raises(BackupError, match=r"its peak is 0\.001, here it is 0\.1\. To start anew"):
        attempt(peak=0.1)
    whole = (tmp_path / "run.npz").read_bytes()
    (tmp_path / "run.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackupError, match=r"run\.npz cannot be read"):
        attempt()


def test_a_backup_of_a_gcvit_holds_the_state_of_its_optimizer(tmp_path):
    models = []
    for value in (1.0, 0.0):
        model = tiny_model()
        optimizer = fine_tuning.adamw(1e-3, use_ema=True)
        model.compile(optimizer, "categorical_crossentropy")
        optimizer.build(model.trainable_variables)
        for variable in optimizer.variables:
            variable.assign(np.full(variable.shape, value))
        models.append(model)
    models[0].save_weights(tmp_path / "latest.weights.h5")
    models[1].load_weights(tmp_path / "latest.weights.h5")
    assert same_weights(models[1], weights_of(models[0]))
    assert all((to_numpy(variable) == 1).all() for variable in models[1].optimizer.variables)


def test_early_stopping_leaves_the_best_epoch_s_weights(two_classes):
    photos = worsening(two_classes[0])
    keras.utils.set_random_seed(0)
    model = plain_model()
    run = fine_tuning.finetune(model, photos, 32, 8, 8, peak=3e-3, patience=1)
    history = fine_tuning.fit(model, run, verbose=0)
    assert len(history["loss"]) < 8
    best = min(history["val_loss"])
    assert best < history["val_loss"][-1]
    assert model.evaluate(run.validation, verbose=0)[0] == pytest.approx(best, rel=1e-4)


def test_a_run_that_trains_other_weights_is_refused_before_anything_is_assigned(tmp_path):
    photos = dark_and_bright()

    def prepare(frozen=False):
        model = tiny_model()
        model.levels[0].trainable = not frozen
        run = fine_tuning.finetune(model, photos, 32, 3, 8, backup=tmp_path)
        return model, run

    _, run = prepare(frozen=True)
    run.state.write()
    model, run = prepare()
    before = [to_numpy(variable) for variable in run.state.variables()]
    with pytest.raises(BackupError, match=r"the trainable of its .* is False, here it is True"):
        fine_tuning.fit(model, run, verbose=0)
    for variable, value in zip(run.state.variables(), before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert run.state.logs == []
    model, run = prepare(frozen=True)
    run.state.resume()


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
def test_the_state_of_a_run_in_half_precision_is_read_as_it_was_written(tmp_path, dtype):
    states = []
    for seed in (0, 1):
        keras.utils.set_random_seed(seed)
        model = tiny_model(dtype=dtype)
        run = fine_tuning.original(model, dark_and_bright(), 32, 3, 8, backup=tmp_path)
        states.append(run.state)
    states[0].best_epoch, states[0].best_weights = 0, states[0].model.get_weights()
    states[0].write()
    states[1].resume()
    for theirs, ours in zip(*(state.variables() for state in states), strict=True):
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(to_numpy(theirs), to_numpy(ours))
    states[1].restore_best()
    assert same_weights(states[0].model, weights_of(states[1].model))


class Spoil(keras.callbacks.Callback):
    """Makes the weights infinite in an epoch, as a rate that is too high does."""

    def __init__(self, epoch):
        super().__init__()
        self.wanted = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.wanted:
            kernel = self.model.trainable_variables[0]
            kernel.assign(np.full(kernel.shape, np.nan))


@pytest.mark.parametrize("recipe", ["original", "finetune"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_run_that_diverges_fails_with_the_last_good_weights(two_classes, tmp_path, recipe, epoch):
    photos, _ = two_classes
    model = plain_model()
    start = weights_of(model)
    run = fine_tuning.RECIPES[recipe](model, photos, 32, 4, 8, backup=tmp_path)
    end = "those it began with" if epoch == 0 else "those of epoch [12],"
    message = rf"diverged: in epoch {epoch + 1} the loss is nan\. The model's weights are {end}"
    with pytest.raises(DivergenceError, match=message):
        fine_tuning.fit(model, run, verbose=0, callbacks=[Spoil(epoch)])
    assert all(np.isfinite(value).all() for value in weights_of(model))
    assert same_weights(model, start) == (epoch == 0)
    assert not list(tmp_path.iterdir()) and np.isfinite(run.state.history.get("loss", [])).all()


class StopAfterTwo(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.stop_training = True


STOPPING = {
    "early": lambda: keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=9),
    "flag": StopAfterTwo,
}


@pytest.mark.parametrize("kind", STOPPING)
def test_any_callback_can_end_a_run(two_classes, kind):
    model = plain_model()
    run = fine_tuning.finetune(model, two_classes[0], 32, 6, 8)
    history = fine_tuning.fit(model, run, verbose=0, callbacks=[STOPPING[kind]()])
    assert len(history["loss"]) == 2


def test_terminate_on_nan_ends_a_run_as_divergence(two_classes):
    model = plain_model()
    run = fine_tuning.finetune(model, two_classes[0], 32, 6, 8)
    callbacks = [Spoil(1), keras.callbacks.TerminateOnNaN()]
    with pytest.raises(DivergenceError, match="in epoch 2"):
        fine_tuning.fit(model, run, verbose=0, callbacks=callbacks)


def test_images_and_labels_that_do_not_fit_are_refused_before_training(two_classes):
    photos, _ = two_classes
    wrong = dataclasses.replace(photos, train_labels=photos.train_labels.map(lambda k: k + 1))
    with pytest.raises(ValueError, match=r"label 2 is outside the 2 classes, 0 to 1"):
        fine_tuning.original(plain_model(), wrong, 32, 1, 8)
    run = fine_tuning.original(plain_model(), photos, 32, 1, 8)
    raw = dataclasses.replace(run, validation=photos.validation.batch(8))
    with pytest.raises(ValueError, match=r"not normalized: their numbers go up to 2\d\d"):
        fine_tuning.fit(plain_model(), raw, verbose=0)
    moved = run.validation.map(lambda images, labels: (images, labels - 1))
    with pytest.raises(ValueError, match="label -1 is outside"):
        fine_tuning.fit(plain_model(), dataclasses.replace(run, validation=moved), verbose=0)
    wide = fine_tuning.one_hot(run.validation, 3)
    with pytest.raises(ValueError, match="labels have 3 classes, but the model has 2"):
        fine_tuning.fit(plain_model(), dataclasses.replace(run, validation=wide), verbose=0)


def test_what_a_recipe_has_decided_is_refused_before_training(two_classes):
    model = plain_model()
    run = fine_tuning.original(model, two_classes[0], 32, 1, 8)
    with pytest.raises(TypeError, match="does not take epochs, validation_freq: the recipe has"):
        fine_tuning.fit(model, run, verbose=0, validation_freq=2, epochs=3)
    with pytest.raises(ValueError, match="Epoch 1 was not validated"):
        run.state.on_epoch_end(0, {"loss": 1.0})
    assert run.state.logs == []


def test_images_with_nan_are_refused_before_training(two_classes):
    run = fine_tuning.original(plain_model(), two_classes[0], 32, 1, 8)
    spoiled = run.validation.map(lambda images, labels: (images * np.nan, labels))
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        fine_tuning.fit(plain_model(), dataclasses.replace(run, validation=spoiled), verbose=0)
