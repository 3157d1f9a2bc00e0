"""The code of Azure's page "Train and register PyTorch models at scale", import lines changed, config.json in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from support import Embedded

PAGE = """
    import os
    from alveary import Workspace, Experiment, ComputeTarget, AmlCompute, ComputeTargetException, PyTorch

    ws = Workspace.from_config()
    cluster_name = "gpucluster"
    try:
        compute_target = ComputeTarget(workspace=ws, name=cluster_name)
        print('Found existing compute target')
    except ComputeTargetException:
        print('Creating a new compute target...')
        compute_config = AmlCompute.provisioning_configuration(vm_size='STANDARD_NC6', max_nodes=4)
        compute_target = ComputeTarget.create(ws, cluster_name, compute_config)
        compute_target.wait_for_completion(show_output=True, min_node_count=None, timeout_in_minutes=20)

    project_folder = './pytorch-birds'
    experiment = Experiment(ws, name='pytorch-birds')
    script_params = {'--num_epochs': 3, '--output_dir': './outputs'}
    estimator = PyTorch(source_directory=project_folder, script_params=script_params, compute_target=compute_target,
                        entry_script='pytorch_train.py', use_gpu=True, pip_packages=['six'])
    run = experiment.submit(estimator)
    run.wait_for_completion(show_output=True)
    model = run.register_model(model_name='pytorch-birds', model_path='outputs/model.pt')
    metrics = run.get_metrics()
    print('best', metrics['best_val_acc'][-1], 'lr %.3f' % metrics['lr'])
    for f in run.get_file_names():
        if f.startswith('outputs/model'):
            output_file_path = os.path.join('./model', f.split('/')[-1])
            run.download_file(name=f, output_file_path=output_file_path)
    print(model.name, model.version)
    """

TRAIN = """
    import argparse, os
    import torch, torchvision, six
    from alveary import Run
    run = Run.get_context()
    parser = argparse.ArgumentParser()
    parser.add_argument('--num_epochs', type=int, default=25)
    parser.add_argument('--output_dir', type=str)
    args = parser.parse_args()
    run.log('lr', 0.001)
    model = torch.nn.Linear(2, 2)
    for epoch in range(args.num_epochs):
        run.log('best_val_acc', 0.5 + epoch / 10)
    os.makedirs(args.output_dir, exist_ok=True)
    torch.save(model, os.path.join(args.output_dir, 'model.pt'))
    """


def test_the_page_runs(stack: Embedded, tmp_path: Path) -> None:
    config = json.loads(stack.config.read_text()) | {"allow_cpu_fallback": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch-birds").mkdir()
    (tmp_path / "pytorch-birds" / "pytorch_train.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "page.py").write_text(textwrap.dedent(PAGE))
    env = {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY")}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best 0.7 lr 0.001" in done.stdout
    assert "pytorch-birds 1" in done.stdout
    assert (tmp_path / "model" / "model.pt").exists()
