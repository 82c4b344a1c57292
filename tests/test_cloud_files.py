"""Files of clouds: every kind is read exactly, meshes are sampled by area, and what is no cloud is named."""

import ast
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deltalens.data.cloud_files import read_cloud
from deltalens.data.meshes import POINTS, sample_mesh

CLOUD = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)


def rows(values: np.ndarray, separator: str = " ") -> str:
    return "".join(separator.join(map(repr, map(float, row))) + "\n" for row in values)


def ply(order: str, vertices: np.ndarray, faces=()) -> bytes:
    """A file with a colour before the positions, and faces of any length."""
    kind = {"ascii": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[order]
    head = f"ply\nformat {kind} 1.0\ncomment x\nelement vertex {len(vertices)}\nproperty uchar red\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    if len(faces):
        head += f"element face {len(faces)}\nproperty list uchar int vertex_indices\n"
    content = (head + "end_header\n").encode()
    if order == "ascii":
        lines = ["7 " + rows(row[None]).strip() for row in vertices]
        lines += [" ".join(map(str, (len(face), *face))) for face in faces]
        return content + "\n".join(lines).encode()
    content += b"".join(struct.pack(f"{order}B3f", 7, *row) for row in vertices)
    return content + b"".join(struct.pack(f"{order}B{len(face)}i", len(face), *face) for face in faces)


def files() -> dict[str, bytes]:
    normals = np.concatenate([CLOUD, CLOUD[::-1]], 1)
    return {
        "a.xyz": ("# x y z\n" + rows(CLOUD)).encode(),
        "a.txt": rows(normals, ",").encode(),
        "a.pts": (f"{len(CLOUD)}\n" + rows(CLOUD)).encode(),
        "a.off": (f"OFF\n{len(CLOUD)} 0 0\n" + rows(CLOUD)).encode(),
        "b.off": (f"OFF{len(CLOUD)} 0 0\n" + rows(CLOUD)).encode(),  # as some files of ModelNet
        "a.ply": ply("ascii", CLOUD),
        "b.ply": ply("<", CLOUD),
        "c.ply": ply(">", CLOUD),
    }


@pytest.mark.parametrize("name", files())
def test_every_kind_of_file_gives_the_same_points(tmp_path, name):
    (tmp_path / name).write_bytes(files()[name])
    cloud = read_cloud(tmp_path / name)
    assert cloud.dtype == np.float32
    assert np.array_equal(cloud, CLOUD)


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.concatenate([CLOUD, CLOUD], 1).astype(np.float64))
    np.savez(tmp_path / "a.npz", points=CLOUD, other=np.zeros(3))
    np.savez(tmp_path / "b.npz", anything=CLOUD)
    for name in ("a.npy", "a.npz", "b.npz"):
        assert np.array_equal(read_cloud(tmp_path / name), CLOUD)
    np.savez(tmp_path / "c.npz", one=CLOUD, two=CLOUD)
    with pytest.raises(ValueError, match=r"c\.npz: it holds the arrays one, two; expected one, or one called points"):
        read_cloud(tmp_path / "c.npz")


@pytest.mark.parametrize("name", ["m.off", "m.ply", "n.ply"])
def test_meshes_are_sampled_the_same_every_time(tmp_path, name):
    faces = [(0, 1, 2, 3)]
    off = f"OFF\n4 1 0\n{rows(SQUARE)}4 0 1 2 3\n".encode()
    (tmp_path / name).write_bytes(
        {"m.off": off, "m.ply": ply("ascii", SQUARE, faces)}.get(name, ply("<", SQUARE, faces))
    )
    cloud = read_cloud(tmp_path / name)
    assert cloud.shape == (POINTS, 3)
    assert (cloud[:, 2] == 0).all()
    assert ((cloud >= 0) & (cloud <= 1)).all()
    assert np.abs(cloud[:, :2].mean(0) - 0.5).max() < 0.01
    assert np.array_equal(cloud, read_cloud(tmp_path / name))


def test_triangles_get_points_by_their_area():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 3, 5]], dtype=np.float32)
    cloud = sample_mesh(vertices, [np.array([0, 1, 2]), np.array([3, 4, 5])], 5000)
    assert (cloud[:, 2] == 5).mean() == pytest.approx(0.9, abs=0.01)
    high = cloud[cloud[:, 2] == 5]
    assert (high[:, 0] + high[:, 1] <= 3 + 1e-5).all()
    assert np.abs(high.mean(0) - [1, 1, 5]).max() < 0.05  # the centre of the triangle
    with pytest.raises(ValueError, match="no area"):
        sample_mesh(np.zeros((3, 3)), [np.array([0, 1, 2])])
    with pytest.raises(ValueError, match="names a vertex that is not there; there are 3"):
        sample_mesh(np.eye(3), [np.array([0, 1, 3])])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", b"", "it has no points"),
        ("a.xyz", b"1 2 3\n1 nan 3\n", "1 of 2 points are NaN or infinite"),
        ("a.xyz", b"1 2\n3 4\n", r"expected an array \(points, 3 or more\), found the shape \(2, 2\)"),
        ("a.txt", b"1 2 x\n", "could not convert"),
        ("a.txt", b"\xff\xd8\xff\xe0", "codec"),
        ("a.off", b"1 2 3\n", "does not begin with OFF"),
        ("a.off", b"OFF\n4 0 0\n1 2 3\n", "announces 4 vertices"),
        ("a.off", b"OFF\n3 1 0\n1 2 3\n1 2 4\n1 2 5\n3 0 1\n", "a face ends early"),
        ("a.ply", b"plx\n", "does not begin with ply"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n", "no y, z"),
        ("a.ply", b"ply\nformat pdf 1.0\n", "its format pdf is not one of ascii"),
        ("a.ply", ply("<", CLOUD)[:-1], "ends early"),
        ("a.ply", ply("ascii", CLOUD)[:-30], "ends early|has"),
        ("a.npy", b"nothing", "magic string"),
        ("a.npz", b"nothing", "no archive of arrays"),
        ("a.obj", b"v 1 2 3", "expected one of .npy"),
    ],
)
def test_what_is_no_cloud_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the cloud .*{name}: (.|\n)*({message})"):
        read_cloud(tmp_path / name)


def test_arrays_of_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy: .*allow_pickle"):
        read_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_threads_parse_headers_of_arrays_one_after_another(tmp_path, monkeypatch, name):
    """Two parses at once raise SystemError in some Pythons (gh-106905)."""
    np.save(tmp_path / "a.npy", CLOUD)
    np.savez(tmp_path / "a.npz", CLOUD)
    parse, now, most = ast.literal_eval, [], []

    def watched(header):
        now.append(header)
        most.append(len(now))
        time.sleep(2e-3)
        now.pop()
        return parse(header)

    monkeypatch.setattr(ast, "literal_eval", watched)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_cloud, [tmp_path / name] * 8))
    assert most == [1] * 8
    assert all(np.array_equal(cloud, CLOUD) for cloud in found)
