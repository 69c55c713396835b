"""make.py: hand the class out, and grade it. It needs only the standard library; the tests need torch.

    python assignments/make.py starter DIR                  # the repository without the solutions
    python assignments/make.py starter DIR gae score        # only these two are left blank
    python assignments/make.py check .                      # in a starter: all exercises of this folder
    python assignments/make.py check . gae Segment.add      # some of them
    python assignments/make.py check DIR --gradescope results.json     # the instructor, on a student's folder

check takes one function at a time from DIR and puts it into a copy of the repository that this script is in.
In the instructor's copy all other functions are solutions, so one mistake costs one exercise. check takes
    the function, by its name, with its decorators; of "update" the lines of train() between two banners
    the helper functions, constants and imports that it uses, and those that the helpers use, if they are
    at the top level of the student's file and the copy does not have a name like theirs. So a helper of
    the repository that the student has changed is not taken
Each check runs in its own process with a time limit (--seconds). A hang, an exit, a print or a file that does
not parse costs only the exercises concerned.

RUN A STUDENT'S CODE ONLY WHERE YOU WOULD RUN IT BY HAND: in a container, or as a user who owns nothing. The
processes are no sandbox: such code can read your files and use your memory, and can forge its own points.
"""
import argparse
import ast
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from exercises import EXERCISES  # noqa: E402

# The files of a starter. results/raw is large, and results/variants.py would show the two additions.
COPIED = ["*.py", "*.txt", "README.md", "LICENSE", ".gitignore", "results/*.md", "results/*.png",
          "results/figures.py", "assignments/README.md", "assignments/make.py", "assignments/exercises.py"]


class Unusable(Exception):
    """A student's file cannot be used, and the message says why. The exercise has no points then."""


def fail(message):
    raise SystemExit(f"error: {message}")


# ------------------------------------------------------------------------------------------------------------
# Source files: their lines and their syntax trees.

def read(path):
    """-> (lines of a file with their line ends, its syntax tree). Raises Unusable."""
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise Unusable(f"{name} is not in the folder")
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read().rstrip("\n")
        return [line + "\n" for line in text.split("\n")], ast.parse(text)
    except SyntaxError as e:
        raise Unusable(f"{name} does not parse: line {e.lineno}: {e.msg}")
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        raise Unusable(f"{name} cannot be read: {e}")


def find(tree, name):
    """The last function of this name, "gae" or "Segment.add" -> its node, None if there is none."""
    *classes, name = name.split(".")
    for owner in classes:
        tree = next((n for n in reversed(tree.body) if isinstance(n, ast.ClassDef) and n.name == owner), None)
        if tree is None:
            return None
    return next((n for n in reversed(tree.body) if isinstance(n, ast.FunctionDef) and n.name == name), None)


def span(tree, lines, exercise):
    """-> (first, last) line of an exercise's function with its decorators, or of its block: the lines between
    two banners in a function. They are a slice's ends. Raises Unusable."""
    function = exercise.block[0] if exercise.block else exercise.name
    node = find(tree, function)
    if node is None:
        raise Unusable(f"{exercise.file} has no function {function}")
    if not exercise.block:
        return whole(node)
    ends = []
    for banner in exercise.block[1:]:
        found = [i for i in range(node.lineno, node.end_lineno) if lines[i].strip().startswith(banner)]
        if len(found) != 1:
            raise Unusable(f"{function}() in {exercise.file}: expected one line that begins with "
                           f"'{banner}', got {len(found)}")
        ends += found
    return ends[0] + 1, ends[1]


def indent(line):
    return len(line) - len(line.lstrip())


def whole(node):
    """-> (first, last) line of a statement with its decorators, as a slice's ends."""
    return min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1, node.end_lineno


def bound(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def helpers(function, theirs, known):
    """The lines of the top-level names that a function uses and the solution's file does not know."""
    wanted, taken = names_in(function), {}
    for _ in theirs.body:  # helpers of helpers: as often as there are statements is enough
        for i, node in enumerate(theirs.body):
            new = bound(node) - known
            is_import = isinstance(node, (ast.Import, ast.ImportFrom))
            if i not in taken and new & wanted and (is_import or new == bound(node)):
                taken[i] = node
                wanted |= names_in(node)
                if is_import:  # only the new names, if an import was made longer
                    node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in new]
    return [ast.unparse(taken[i]) + "\n" for i in sorted(taken)]


# ------------------------------------------------------------------------------------------------------------
# starter

def blanked(lines, tree, exercise):
    """The lines of a file without one function's body or block. Signature, docstring and banners stay."""
    start, end = span(tree, lines, exercise)
    todo = f'raise NotImplementedError("exercise {exercise.name}")\n'
    if exercise.block:
        return lines[:start] + [" " * indent(lines[end]) + todo + "\n"] + lines[end:]
    node = find(tree, exercise.name)
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if documented else first.lineno - 1
    return lines[:start] + [" " * first.col_offset + todo] + lines[end:]


def starter(folder, chosen):
    """Copy the repository into an empty or new folder, without the bodies of the chosen exercises."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        fail(f"{folder} exists and is not an empty folder")
    for pattern in COPIED:
        for path in glob.glob(pattern, root_dir=ROOT):
            target = os.path.join(folder, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(os.path.join(ROOT, path), target)
    for exercise in (e for e in chosen if not e.added):
        path = os.path.join(folder, exercise.file)
        lines = blanked(*read(path), exercise)
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)
    taken = sum(not e.added for e in chosen)
    print(f"{folder}: {taken} exercises are to be written, {len(chosen) - taken} are to be added")


# ------------------------------------------------------------------------------------------------------------
# check

def assembled(exercise, student):
    """The text of the repository's file with the student's function in it. Raises Unusable."""
    their_lines, theirs = read(os.path.join(student, exercise.file))
    lines, tree = read(os.path.join(ROOT, exercise.file))
    first, last = span(theirs, their_lines, exercise)
    text = "".join(their_lines[first:last])
    known, used = set().union(*map(bound, tree.body)), find(theirs, exercise.name)
    if exercise.block:
        try:
            used = ast.parse("if True:\n" + text + " " * indent(their_lines[last]) + "pass")
        except SyntaxError:
            raise Unusable(f"{exercise.file}: the lines between the two banners are not whole statements")
    extra = helpers(used, theirs, known if exercise.block else known | {exercise.name})
    if exercise.added:  # it goes to the end
        return "".join(lines + extra) + text
    start, end = span(tree, lines, exercise)
    above = -1 if exercise.block else 0  # a block is as deep as its banner
    depth = indent(lines[start + above])
    if indent(their_lines[first + above]) != depth:  # the student's file has another indentation
        text = textwrap.indent(textwrap.dedent(text), " " * depth)
    owner = exercise.block[0] if exercise.block else exercise.name.split(".")[0]
    before = whole(next(node for node in reversed(tree.body) if owner in bound(node)))[0]
    return "".join(lines[:before] + extra + lines[before:start] + [text] + lines[end:])


def check(exercise, student, seconds):
    """Check one exercise in its own process -> (passed, what was wrong, what it printed)."""
    try:
        text = assembled(exercise, student)
    except Unusable as e:
        return False, str(e), ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as verdicts:
        for path in [*glob.glob("*.py", root_dir=ROOT), "assignments/exercises.py"]:
            shutil.copy(os.path.join(ROOT, path), folder)
        with open(os.path.join(folder, exercise.file), "w", encoding="utf-8") as f:
            f.write(text)
        handle, verdict = tempfile.mkstemp(dir=verdicts)  # a random name, sent through a pipe
        os.close(handle)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        clean["OMP_NUM_THREADS"] = "1"  # small tensors: more threads only wait for each other
        process = subprocess.Popen(
            [sys.executable, "exercises.py", exercise.name], cwd=folder, env=clean, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        try:
            process.communicate(verdict + "\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"no verdict within {seconds:g} seconds", ""
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also the processes that it started
            except (ProcessLookupError, PermissionError):  # all have ended
                pass
            process.wait()
        try:
            with open(verdict) as f:
                found = json.load(f)
            return found["passed"] is True, " ".join(found["why"].split()), found["printed"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # mostly an empty file
            return False, f"the process ended before the test did (exit code {process.returncode})", ""


def grade(folder, chosen, seconds, gradescope):
    """Check all chosen exercises, print a line each and the points, and write Gradescope's results.json."""
    if not os.path.isdir(folder):
        fail(f"{folder} is not a folder")
    if not gradescope and not any(os.path.isfile(os.path.join(folder, e.file)) for e in chosen):
        fail(f"{folder} has no {' and no '.join(sorted({e.file for e in chosen}))}")
    if gradescope:
        open(gradescope, "w").close()  # before the work, to see whether it can be written
    results, points = [], 0
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))  # 0.4 GB each; a container sees all of its host's
    checks = pool.map(lambda e: check(e, folder, seconds), chosen)
    for e, (passed, why, printed) in zip(chosen, checks):
        points += e.points * passed
        why, printed = (x.encode("utf-8", "replace").decode() for x in (why, printed))  # half a surrogate
        print(f"{e.name:20} {e.points * passed:3d} / {e.points:<3d} {why}", flush=True)
        printed = textwrap.indent(printed.rstrip()[-500:], "printed: ") * (not passed)
        if printed:
            print(textwrap.indent(printed, " " * 22))
        results.append({"name": f"sheet {e.sheet}: {e.name}", "score": e.points * passed,
                        "max_score": e.points, "output": "\n".join(filter(None, [why or "passed", printed]))})
    print(f"{'total':20} {points:3d} / {sum(e.points for e in chosen)}")
    if gradescope:
        with open(gradescope, "w", encoding="utf-8") as f:
            json.dump({"tests": results}, f, indent=1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["starter", "check"])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("exercises", nargs="*", metavar="EXERCISE", help="names of exercises (default: all)")
    parser.add_argument("--gradescope", metavar="FILE", help="check: write Gradescope's results.json here")
    parser.add_argument("--seconds", type=float, default=60,
                        help="check: time limit of one exercise (default: 60)")
    args = parser.parse_intermixed_args(argv)
    unknown = [name for name in args.exercises if name not in EXERCISES]
    if unknown:
        fail(f"there is no exercise {unknown[0]}; there are {', '.join(EXERCISES)}")
    if not 0 < args.seconds < 1e6:
        fail(f"--seconds {args.seconds:g} is not a time limit above 0")
    chosen = [EXERCISES[name] for name in dict.fromkeys(args.exercises)] or list(EXERCISES.values())
    try:
        if args.command == "starter":
            starter(args.folder, chosen)
        else:
            grade(args.folder, chosen, args.seconds, args.gradescope)
    except (OSError, Unusable) as e:
        fail(e)


if __name__ == "__main__":
    main()
