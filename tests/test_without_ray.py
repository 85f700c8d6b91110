"""PPO, results and statistics run in a process in which Ray cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.environment import python_path

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )


def test_one_ppo_step_runs_in_one_process_without_ray():
    code = (
        "import runpy, sys\n"
        "sys.modules['ray'] = None  # importing it now fails\n"
        f"sys.argv = ['single_process.py', *sys.argv[1:]]\n"
        f"runpy.run_path({str(ROOT / 'scripts/single_process.py')!r}, run_name='__main__')\n"
    )

    ended = run_python(
        code, "--steps", "1", "--device", "cpu", "ppo.prompts_per_step=16", "ppo.epochs=1"
    )

    assert ended.returncode == 0, ended.stderr
    stats = json.loads(ended.stdout.splitlines()[-1])
    assert stats["step"] == 1
    assert abs(stats["ratio"] - 1) < 1e-5
    assert abs(stats["kl"]) < 1e-3
    assert stats["grad_norm"] > 0
    assert "ray imported: False" in ended.stderr


def test_results_and_statistics_need_no_torch():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "sys.modules['ray'] = None\n"
        "import ray_detox.cli.main, ray_detox.cli.results, ray_detox.cli.jobs, ray_detox.api\n"
        "import ray_detox.evaluation.statistics, ray_detox.evaluation.verdict\n"
        "import ray_detox.evaluation.metrics, ray_detox.evaluation.summarise\n"
        "import ray_detox.runs.report_text, ray_detox.store.sqlite, ray_detox.lab.corpus\n"
    )

    ended = run_python(code)

    assert ended.returncode == 0, ended.stderr


def test_actors_without_a_model_load_no_torch():
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['ray.train'] = sys.modules['ray.data'] = None\n"
        "import ray_detox.stages.rewards.directory, ray_detox.stages.progress, ray_detox.stages.evaluate\n"
    )

    ended = run_python(code)

    assert ended.returncode == 0, ended.stderr
