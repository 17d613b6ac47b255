package raftstore

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

func TestRebuild(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	id := s.ID()
	if _, err := Rebuild(dir, true); err == nil || !strings.Contains(err.Error(), "in use by another rxvision server") {
		t.Errorf("while it runs: %v", err)
	}
	mustClose(t, s)
	mustWrite(t, filepath.Join(dir, "neighbour"), "stays")

	if _, err := Rebuild(dir, false); err == nil || !strings.Contains(err.Error(), "the only copy") {
		t.Errorf("region of one server: %v", err)
	}
	setVoters := func(n int32) {
		t.Helper()
		st, err := openStable(dir, false)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		if err := st.put(map[string][]byte{markKey: cluster.Marshal(mark{Voters: n})}); err != nil {
			t.Fatal(err)
		}
	}
	setVoters(3)
	moved, err := Rebuild(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if names := list(t, dir); !slices.Equal(names, []string{filepath.Base(moved), lockFile, "neighbour", tmpFolder}) {
		t.Errorf("left in the folder: %v", names)
	}
	if names := list(t, moved); !slices.Equal(names, []string{clusterFile, walFolder, idFile, snapFolder, stableFile}) {
		t.Errorf("moved: %v", names)
	}
	if _, err := Rebuild(dir, true); err == nil || !strings.Contains(err.Error(), "holds no server") {
		t.Errorf("twice: %v", err)
	}
	s = mustOpen(t, dir) // as the first of a new region: nobody else is there in this test
	if s.ID() == id {
		t.Error("the rebuilt server has its old ID, and with it a vote that it has forgotten")
	}
	if jobs := len(dump(t, s)); jobs > 9 {
		t.Errorf("%d records are left", jobs)
	}
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// Where the stable file is gone the snapshots know how many servers there are.
func TestRebuildWithoutStableFile(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	if err := os.Remove(filepath.Join(dir, stableFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(testConfig(t, dir)); err == nil || !strings.Contains(err.Error(), "rxvision server rebuild") {
		t.Errorf("open: %v", err)
	}
	if _, err := Rebuild(dir, false); err == nil || !strings.Contains(err.Error(), "the only copy") {
		t.Errorf("rebuild: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, snapFolder)); err != nil {
		t.Fatal(err)
	}
	if _, err := Rebuild(dir, false); err == nil || !strings.Contains(err.Error(), "how many servers") {
		t.Errorf("rebuild knowing nothing: %v", err)
	}
	if _, err := Rebuild(dir, true); err != nil {
		t.Error(err)
	}
}

func TestInspect(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	fill(t, s, 3)
	archive, _ := mustSave(t, s)
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	saved := filepath.Join(t.TempDir(), "saved")
	mustWrite(t, saved, string(archive))
	own := newestSnapshot(t, dir)
	alone := filepath.Join(t.TempDir(), "alone")
	mustWrite(t, alone, string(mustRead(t, own)))
	for path, kind := range map[string]string{saved: "archive", own: "snapshot", alone: "snapshot"} {
		in, err := Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		if in.Fault != nil || in.Kind != kind || in.Index == 0 || in.CreatedBy != "rxvision 0.0.0 test" || in.Created.IsZero() || in.Length == 0 {
			t.Errorf("%s: %+v", path, in)
		}
		jobs := slices.IndexFunc(in.Tables, func(i TableInfo) bool { return i.Name == cluster.TableJobs })
		if in.Tables[jobs].Records != 3 || in.Tables[jobs].Bytes == 0 {
			t.Errorf("%s: jobs %+v", path, in.Tables[jobs])
		}
		for _, at := range []int{300, len(mustRead(t, path)) / 2} {
			if in.Kind == "snapshot" && path == alone {
				continue // a byte that no record holds means nothing there
			}
			flip(t, path, at)
			if in, err := Inspect(path); err != nil || in.Fault == nil {
				t.Errorf("%s, byte %d changed: %+v, %v", path, at, in, err)
			}
			flip(t, path, at)
		}
	}
	random := mustSeed(t)
	whole := mustRead(t, alone)
	for i := 0; i < 400; i++ { // damage that no hash beside the file tells of: it must not crash
		b := slices.Clone(whole)
		b[random.IntN(len(b))] ^= byte(1 + random.IntN(255))
		mustWrite(t, alone, string(b))
		if in, err := Inspect(alone); err == nil && in.Fault == nil && in.Tables[2].Records != 3 {
			t.Errorf("sound, but %+v", in)
		}
	}
	mustWrite(t, alone, strings.Repeat("no snapshot", 100))
	if _, err := Inspect(alone); err == nil || !strings.Contains(err.Error(), "neither") {
		t.Errorf("inspect of something else: %v", err)
	}
}
