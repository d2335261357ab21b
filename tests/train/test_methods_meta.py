"""Promise: meta-prompts are those of Reptile, and LION's robust training keeps what is critical."""

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES
from torch import nn
from train_runs import CLASSES, MemorySource, make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.methods.vp import STRIPS
from tcpa.train.engine.distributed import World
from tcpa.train.engine.model import build_model
from tcpa.train.engine.stages import Stages, load_meta_prompt
from tcpa.train.engine.step import keep_critical
from tcpa.train.engine.trainer import STAGE, Trainer, derive
from tcpa.train.jobs.meta_prompt import MetaTask, meta_train, save_meta_prompt
from tcpa.train.jobs.run import run
from tcpa.train.options.meta_prompt import MetaPromptConfig
from tcpa.train.recipes.runspec import resolve

CPU = World(torch.device("cpu"))
TINY = ARCHITECTURES["vit-tiny"]


def make_task(seed, clusters=2, count=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    labels = torch.arange(count) % 3
    config = tcpa.DAMVPConfig(width=3, num_clusters=clusters)
    torch.manual_seed(seed)
    model = tcpa.wrap(TINY.create(), None, num_classes=3, input_prompt=config)
    model.fit_clusters(images)
    return MetaTask(model=model, source=MemorySource(images, labels, batch_size=4))


def test_the_meta_prompt_moves_to_the_mean_of_all_frames():
    config = MetaPromptConfig(datasets=("dtd",), epochs=1, update_steps=2)
    tasks = [make_task(1), make_task(2, clusters=3)]
    copies = [make_task(1), make_task(2, clusters=3)]
    found = meta_train(tasks, config)
    # One step, written out: two batches a task, rate 1, weight decay 1e-4, heads at 0.1.
    meta = [None] * 4
    frames = [[] for _ in STRIPS]
    generator_start = meta_start(config, copies[0].model.input_prompt)
    for task in copies:
        prompt, head = task.model.input_prompt, task.model.backbone.head
        prompt.use_meta_prompt(generator_start)
        for batch in task.source.epoch(0):
            values = [*prompt.parameters(), *head.parameters()]
            loss = F.cross_entropy(task.model(batch.images), batch.labels)
            grads = torch.autograd.grad(loss, values)
            with torch.no_grad():
                for value, grad in zip(values[:4], grads[:4], strict=True):
                    value -= grad + 1e-4 * value
                for value, grad in zip(values[4:], grads[4:], strict=True):
                    value -= 0.1 * grad
        for index, name in enumerate(STRIPS):
            frames[index].append(getattr(prompt, name).detach())
    for index, start in enumerate(generator_start):
        every = torch.cat(frames[index])
        assert len(every) == 5
        meta[index] = start - 0.5 * (start - every).mean(0)
        torch.testing.assert_close(found[index], meta[index], rtol=1e-4, atol=1e-5)


def meta_start(config, prompt):
    torch.manual_seed(derive(config.seed, STAGE, 0))
    return [torch.randn_like(getattr(prompt, name)[0]) for name in STRIPS]


def test_meta_prompts_come_back_and_start_the_frames_of_a_run(tmp_path):
    path = tmp_path / "meta.safetensors"
    config = make_config(tmp_path, method="dam-vp", protocol="last", meta_prompt=path)
    frame = tcpa.wrap(TINY.create(), None, input_prompt=tcpa.VPConfig(width=4)).input_prompt
    strips = [torch.randn(3, 4, 32), torch.randn(3, 4, 32), torch.randn(3, 24, 4)]
    save_meta_prompt([*strips, strips[2] + 1], path)
    assert all(map(torch.equal, load_meta_prompt(path), [*strips, strips[2] + 1]))
    settings, splits = resolve(config), make_splits()
    built = build_model(settings, CPU, CLASSES)
    trainer = Trainer(built.model, settings, CPU, built.numerics, total_steps=6)
    assert Stages(settings, CPU, trainer, splits.train).before(0).startswith("16 clusters")
    assert (built.model.input_prompt.down == strips[1]).all()
    assert frame.width == built.model.input_prompt.width
    # Another file is another run.
    run(config, splits)
    assert settings.folder.exists()
    save_meta_prompt([*strips, strips[2]], path)
    with pytest.raises(UsageError, match="meta_prompt"):
        run(config, splits)


def test_files_that_are_no_meta_prompts_are_refused(tmp_path):
    path = tmp_path / "meta.safetensors"
    path.write_bytes(b"\0" * 40)
    with pytest.raises(UsageError, match=r"--meta-prompt: .*meta.safetensors cannot be read"):
        load_meta_prompt(path)
    tcpa.wrap(TINY.create(), None).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="is no meta-prompt, expected the strips up, down, left"):
        load_meta_prompt(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="got NaN or infinity in the meta-prompt"):
        save_meta_prompt([torch.full((2, 2), float("nan"))] * 4, path)


def test_only_critical_values_keep_their_gradients():
    values = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]]))
    values.grad = torch.tensor([[1.0, 1.0, -8.0], [0.1, 1.0, 0.2]])
    # |value * gradient| = 1, 2, 4, 0.3, 0.1, 0.2
    keep_critical([values, nn.Parameter(torch.ones(2))], 0.5)
    assert values.grad.tolist() == [[1.0, 1.0, -8.0], [0.0, 0.0, 0.0]]
    keep_critical([values], 0.0)
    assert values.grad.flatten().tolist() == [0, 0, -8, 0, 0, 0]
