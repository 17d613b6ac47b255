package raftstore

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// Each release leaves a data folder and an archive behind, which later versions
// must open: testdata/releases/NAME holds data.tar.gz, archive.snap and
// expect.json. `go test ./raftstore -run Fixture -update` writes the one named by
// fixtureNow anew; do that before a release, under its version, and never after.
const (
	releases   = "testdata/releases"
	fixtureNow = "0.1.0-2"
)

var update = flag.Bool("update", false, "write the fixture of the present version")

// expectation is expect.json: what is in folder and archive.
type expectation struct {
	Index  uint64
	Hash   string         // of the state, as the version that wrote it encodes records
	Counts map[string]int // records by table
}

func expectationOf(t *testing.T, state *cluster.State, index uint64) expectation {
	t.Helper()
	snap := state.Snapshot()
	sum := snap.Hash()
	e := expectation{Index: index, Hash: hex.EncodeToString(sum[:]), Counts: map[string]int{}}
	err := snap.Records(func(table *cluster.Table, _ string, _ any) error { e.Counts[table.Name]++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// mustFreeze opens a folder without letting raft at it, so that its state stays as it is.
func mustFreeze(t *testing.T, dir string) *ReadOnly {
	t.Helper()
	cfg := testConfig(t, dir)
	cfg.Logger = slog.New(slog.DiscardHandler)
	r, err := OpenReadOnly(cfg, &Unwritable{Dir: dir, Cause: errors.New("a test")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestFixtures(t *testing.T) {
	if *update {
		writeFixture(t, filepath.Join(releases, fixtureNow))
	}
	names, err := filepath.Glob(filepath.Join(releases, "*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			var want expectation
			if err := json.Unmarshal(mustRead(t, filepath.Join(name, "expect.json")), &want); err != nil {
				t.Fatal(err)
			}
			archive := mustRead(t, filepath.Join(name, "archive.snap"))
			info, state, err := readArchive(t.Context(), bytes.NewReader(archive), 0, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			mustMeet(t, "archive", expectationOf(t, state, info.Index), want, filepath.Base(name))
			mustKeepFields(t, archive)

			dir := t.TempDir()
			unpack(t, filepath.Join(name, "data.tar.gz"), dir)
			frozen := mustFreeze(t, dir)
			mustMeet(t, "folder", expectationOf(t, frozen.State(), frozen.fsm.appliedIndex()), want, filepath.Base(name))
			mustEqual(t, "folder against archive", dumpState(t, frozen.State()), dumpState(t, state))
			if err := frozen.Close(); err != nil {
				t.Error(err)
			}

			// And as a server. Its own record is written anew, and what was answered.
			s := mustOpen(t, dir)
			got, old := dump(t, s), dumpState(t, state)
			for _, dump := range []map[string]string{got, old} {
				for k := range dump {
					switch table, _, _ := strings.Cut(k, "/"); table {
					case cluster.TableIndex, cluster.TableResults, cluster.TableServers:
						delete(dump, k)
					}
				}
			}
			mustEqual(t, "opened", got, old)
			mustApply(t, s, register("after"))
		})
	}
}

func mustMeet(t *testing.T, what string, got, want expectation, version string) {
	t.Helper()
	if version != fixtureNow {
		got.Hash = want.Hash // later versions write more fields
	}
	for table, n := range want.Counts {
		if got.Counts[table] != n {
			t.Errorf("%s: %d records in table %s, want %d", what, got.Counts[table], table, n)
		}
	}
	if got.Index != want.Index || got.Hash != want.Hash {
		t.Errorf("%s: index %d, hash %s; want %d, %s", what, got.Index, got.Hash, want.Index, want.Hash)
	}
}

// mustKeepFields compares each record with what becomes of it when it is decoded
// and encoded again: fields may come, none may go or change.
func mustKeepFields(t *testing.T, archive []byte) {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	members := tar.NewReader(zip)
	for {
		head, err := members.Next()
		if err != nil {
			t.Fatal(err)
		}
		if head.Name == memberState {
			break
		}
	}
	r := bufio.NewReader(members)
	if _, err := readValue(r, nil, maxRecord); err != nil { // the head
		t.Fatal(err)
	}
	for {
		kind, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		old, err := readValue(r, nil, maxRecord)
		if err != nil {
			t.Fatal(err)
		}
		table := cluster.TableOf(kind)
		record := table.New()
		if err := cluster.Unmarshal(old, record); err != nil {
			t.Fatal(err)
		}
		before, after := map[string]any{}, map[string]any{}
		if err := errors.Join(cluster.Unmarshal(old, &before), cluster.Unmarshal(cluster.Marshal(record), &after)); err != nil {
			t.Fatal(err)
		}
		mustContain(t, table.Name, after, before)
	}
}

// mustContain compares maps field by field; the first may have more.
func mustContain(t *testing.T, where string, got, want map[string]any) {
	t.Helper()
	for k, v := range want {
		if inner, ok := v.(map[string]any); ok {
			if other, ok := got[k].(map[string]any); ok {
				mustContain(t, where+"."+k, other, inner)
				continue
			}
		}
		if !reflect.DeepEqual(got[k], v) {
			t.Errorf("%s.%s was %v, is %v", where, k, v, got[k])
		}
	}
}

func writeFixture(t *testing.T, name string) {
	t.Helper()
	dir := t.TempDir()
	s := mustOpen(t, dir, func(c *Config) { c.segment = 64 << 10 }) // its empty space is in the archive too
	fill(t, s, 3)
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, register("in-the-log"))
	mustClose(t, s)
	frozen := mustFreeze(t, dir)
	if err := os.MkdirAll(name, 0o750); err != nil {
		t.Fatal(err)
	}
	expect, err := json.MarshalIndent(expectationOf(t, frozen.State(), frozen.fsm.appliedIndex()), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(name, "expect.json"), string(expect)+"\n")
	a, err := frozen.SaveArchive(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := io.ReadAll(a)
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(name, "archive.snap"), string(b))
	if err := frozen.Close(); err != nil {
		t.Fatal(err)
	}
	pack(t, dir, filepath.Join(name, "data.tar.gz"))
}

func pack(t *testing.T, dir, path string) {
	t.Helper()
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	members := tar.NewWriter(zip)
	err := members.AddFS(os.DirFS(dir))
	if err = errors.Join(err, members.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, path, out.String())
}

func unpack(t *testing.T, path, dir string) {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(mustRead(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	members := tar.NewReader(zip)
	for {
		head, err := members.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, head.Name)
		if head.FileInfo().Mode().Type() == fs.ModeDir {
			err = os.MkdirAll(to, 0o700)
		} else {
			var b []byte
			if b, err = io.ReadAll(members); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, b, 0o600))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
