package raftstore

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// mustSave gives an archive's bytes.
func mustSave(t *testing.T, s *Store) ([]byte, Archive) {
	t.Helper()
	a, err := s.SaveArchive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	return b, *a
}

func TestArchiveSaveVerifyRestore(t *testing.T) {
	from := mustOpen(t, t.TempDir())
	fill(t, from, 4)
	b, a := mustSave(t, from)
	want := dump(t, from)

	sum := sha256.Sum256(b)
	if a.Length != int64(len(b)) || a.Digest != "sha-256="+base64.StdEncoding.EncodeToString(sum[:]) {
		t.Errorf("length %d, digest %s of %d bytes", a.Length, a.Digest, len(b))
	}
	if left, err := os.ReadDir(from.fsm.tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	info, err := VerifyArchive(bytes.NewReader(b), 0)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(*info) != fmt.Sprint(a.Info) || info.Index != from.fsm.appliedIndex() || info.CreatedBy != "rxvision 0.0.0 test" {
		t.Errorf("verified %+v, saved %+v", *info, a.Info)
	}
	counts := map[string]int{}
	for k := range dumpAll(t, from.State()) {
		table, _, _ := strings.Cut(k, "/")
		counts[table]++
	}
	for _, table := range info.Tables {
		if table.Records != counts[table.Name] {
			t.Errorf("table %s: %d records, want %d", table.Name, table.Records, counts[table.Name])
		}
	}

	dir := t.TempDir()
	to := mustOpen(t, dir)
	old := mustApply(t, to, register("gone"))
	watching := to.State().Snapshot()
	if _, err := to.RestoreArchive(t.Context(), bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "restored", dump(t, to), want)
	<-watching.Abandoned()
	next := mustApply(t, to, register("next"))
	if next.Index <= info.Index || next.Index <= old.Index {
		t.Errorf("after the restore a write got index %d; archive %d, log %d", next.Index, info.Index, old.Index)
	}
	if got := to.State().Snapshot().Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: "next"}); got.CreateIndex != next.Index {
		t.Errorf("job created at %d, result says %d", got.CreateIndex, next.Index)
	}
	want = dump(t, to)
	mustClose(t, to)
	to = mustOpen(t, dir)
	mustEqual(t, "after restart", dump(t, to), want)

	// Back to an archive that is older than the log.
	if _, err := to.RestoreArchive(t.Context(), bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if again := mustApply(t, to, register("again")); again.Index <= next.Index {
		t.Errorf("index went back from %d to %d", next.Index, again.Index)
	}
	if _, err := to.SnapshotMinIndex(t.Context(), next.Index); err != nil {
		t.Error(err)
	}
	if err := to.Snapshot(); err != nil {
		t.Error(err)
	}
	want = dump(t, to)
	mustClose(t, to)
	mustEqual(t, "after second restart", dump(t, mustOpen(t, dir)), want)
}

func TestRestoreBesideWrites(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	fill(t, s, 2)
	b, _ := mustSave(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	acked := make(chan string, 100_000)
	done := make(chan error)
	for w := range 4 {
		go func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("w%d-%d", w, i)
				if _, err := s.Apply(ctx, register(id)); err != nil {
					done <- err
					return
				}
				acked <- id
			}
		}()
	}
	for range 3 {
		if _, err := s.RestoreArchive(t.Context(), bytes.NewReader(b)); err != nil {
			t.Error(err)
		}
	}
	cancel()
	for range 4 {
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("a write beside the restore: %v", err)
		}
	}
	if err := s.State().Snapshot().Check(); err != nil {
		t.Error(err)
	}
}

// One byte changed anywhere, or cut off anywhere: one sentence, nothing changed.
func TestDamagedArchiveChangesNothing(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	mustApply(t, s, register("a"))
	b, _ := mustSave(t, s)
	mustApply(t, s, register("b"))
	want, state := dump(t, s), s.State()
	refused := func(what string, bad []byte) {
		t.Helper()
		_, err := s.RestoreArchive(t.Context(), bytes.NewReader(bad))
		if cluster.CodeOf(err) != cluster.CodeInvalid || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range b {
		bad, mask := bytes.Clone(b), byte(1<<(i%8))
		bad[i] ^= mask
		refused(fmt.Sprintf("byte %d changed by %#x", i, mask), bad)
		if i%7 == 0 {
			refused(fmt.Sprintf("cut to %d bytes", i), b[:i])
		}
	}
	refused("a byte more", append(bytes.Clone(b), 0))
	refused("twice", append(bytes.Clone(b), b...))
	if s.State() != state {
		t.Error("the state was replaced")
	}
	mustEqual(t, "after the refused restores", dump(t, s), want)
	if _, err := s.RestoreArchive(t.Context(), bytes.NewReader(b)); err != nil {
		t.Errorf("the undamaged one: %v", err)
	}
}

// craft packs members with a right seal.
func craft(t *testing.T, members ...member) []byte {
	t.Helper()
	f, err := tempFile(t.TempDir(), "craft-")
	if err != nil {
		t.Fatal(err)
	}
	a := Archive{file: f}
	if err := packMembers(f, time.Unix(1, 0), members...); err != nil {
		t.Fatal(err)
	}
	if err := a.finish(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(&a)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func text(name, body string) member { return member{name, int64(len(body)), strings.NewReader(body)} }

// craftState makes an archive around any state.bin.
func craftState(t *testing.T, state string, change func(*raft.SnapshotMeta)) []byte {
	t.Helper()
	m := raft.SnapshotMeta{Version: 1, ID: "2-7-1000", Index: 7, Term: 2, Size: int64(len(state))}
	if change != nil {
		change(&m)
	}
	meta, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return craft(t, text(memberMeta, string(meta)), text(memberState, state), text(memberSums, sumsOf(string(meta), state)))
}

func sumsOf(meta, state string) string {
	return fmt.Sprintf("%x  meta.json\n%x  state.bin\n", sha256.Sum256([]byte(meta)), sha256.Sum256([]byte(state)))
}

func TestVerifyArchiveNamesTheFault(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	fill(t, s, 1)
	head := string(cluster.Marshal(archiveHead{Format: 1, Index: 7, Term: 2, Created: 1, CreatedBy: "x"}))
	var records strings.Builder
	tables, err := writeRecords(&records, s.State().Snapshot(), archiveHead{Format: 1, Index: 7, Term: 2})
	if err != nil || len(tables) != len(cluster.Tables) {
		t.Fatal(tables, err)
	}
	good := records.String()
	goodMeta := `{"Version":1,"ID":"2-7-1","Index":7,"Term":2,"Size":` + fmt.Sprint(len(good)) + `}`
	record := func(kind byte, body string) string { return head + string([]byte{kind}) + body }
	for _, c := range []struct {
		name    string
		archive []byte
		code    cluster.Code
		want    string // "" means fine
	}{
		{"good", craftState(t, good, nil), "", ""},
		{"members in another order", craft(t, text(memberSums, sumsOf(goodMeta, good)), text(memberState, good), text(memberMeta, goodMeta)), "", ""},
		{"no records", craftState(t, head, nil), "", ""},
		{"empty file", nil, cluster.CodeInvalid, "is not a gzip file"},
		{"text", []byte("hello, this is no archive"), cluster.CodeInvalid, "is not a gzip file"},
		{"other gzip", append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, make([]byte, 64)...), cluster.CodeInvalid, "was not written by rxvision"},
		{"sum of meta.json wrong", craft(t, text(memberMeta, goodMeta+" "), text(memberState, good), text(memberSums, sumsOf(goodMeta, good))), cluster.CodeInvalid, "checksum of meta.json in SHA256SUMS does not match"},
		{"sum of state.bin wrong", craft(t, text(memberMeta, goodMeta), text(memberState, good), text(memberSums, sumsOf(goodMeta, "x"))), cluster.CodeInvalid, "checksum of state.bin in SHA256SUMS does not match"},
		{"sums name more", craft(t, text(memberMeta, goodMeta), text(memberState, good), text(memberSums, sumsOf(goodMeta, good)+"00  x\n")), cluster.CodeInvalid, "names other files"},
		{"sums are no sums", craft(t, text(memberMeta, goodMeta), text(memberState, good), text(memberSums, "what\n")), cluster.CodeInvalid, "lines with a sum"},
		{"one member more", craft(t, text(memberMeta, goodMeta), text("../evil", "x")), cluster.CodeInvalid, `holds "../evil", which does not belong`},
		{"member twice", craft(t, text(memberMeta, goodMeta), text(memberMeta, goodMeta)), cluster.CodeInvalid, `holds "meta.json" twice`},
		{"member missing", craft(t, text(memberMeta, goodMeta), text(memberState, good)), cluster.CodeInvalid, "lacks SHA256SUMS"},
		{"no members", craft(t), cluster.CodeInvalid, "lacks meta.json"},
		{"meta.json is no JSON", craft(t, text(memberMeta, "{")), cluster.CodeInvalid, "not JSON"},
		{"huge meta.json", craft(t, text(memberMeta, strings.Repeat(" ", maxMeta+1))), cluster.CodeTooLarge, "over the limit of 1048576 bytes"},
		{"other version", craftState(t, good, func(m *raft.SnapshotMeta) { m.Version = 2 }), cluster.CodeInvalid, "is of version 2"},
		{"other index", craftState(t, good, func(m *raft.SnapshotMeta) { m.Index = 8 }), cluster.CodeInvalid, "disagree"},
		{"other size", craftState(t, good, func(m *raft.SnapshotMeta) { m.Size++ }), cluster.CodeInvalid, "disagree"},
		{"other format", craftState(t, string(cluster.Marshal(archiveHead{Format: 9})), nil), cluster.CodeInvalid, "is of format 9"},
		{"records of Nomad", craftState(t, "\x80", nil), cluster.CodeInvalid, "is of format 0"},
		{"header is no map", craftState(t, "\xa5hello", nil), cluster.CodeInvalid, "begins its records wrongly"},
		{"empty state", craftState(t, "", nil), cluster.CodeInvalid, "is cut short inside"},
		{"record cut", craftState(t, good[:len(good)-1], nil), cluster.CodeInvalid, "is cut short inside"},
		{"unknown type", craftState(t, record(250, "\x80"), nil), cluster.CodeInvalid, "record of type 250 (number 1)"},
		{"not msgpack", craftState(t, record(1, "\xc1"), nil), cluster.CodeInvalid, "not msgpack"},
		{"not a record", craftState(t, record(1, "\xa5hello"), nil), cluster.CodeInvalid, "cannot be read (number 1)"},
		{"record without key", craftState(t, record(200, "\x80"), nil), cluster.CodeInvalid, "cannot be read (number 1)"},
		{"length that is a lie", craftState(t, record(1, "\xc6\xff\xff\xff\xff"), nil), cluster.CodeInvalid, "holds a record over"},
		{"count that is a lie", craftState(t, record(1, "\xdf\xff\xff\xff\xff"), nil), cluster.CodeInvalid, "is cut short inside"},
		{"deep record", craftState(t, record(1, strings.Repeat("\x91", 1<<20)+"\xc0"), nil), cluster.CodeInvalid, "cannot be read"},
		{"bomb", craftState(t, head+strings.Repeat("\x00", 3<<20), nil), cluster.CodeTooLarge, "over the limit of 2097152 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := VerifyArchive(bytes.NewReader(c.archive), 2<<20)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || cluster.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q with code %s; want %q with %s", err, cluster.CodeOf(err), c.want, c.code)
			}
		})
	}
	large := craftState(t, good, nil)
	if _, err := VerifyArchive(bytes.NewReader(large), int64(len(large))-1); cluster.CodeOf(err) != cluster.CodeTooLarge {
		t.Errorf("archive over the limit: %v", err)
	}
	if _, err := VerifyArchive(io.MultiReader(bytes.NewReader(large[:100]), failingReader{}), 0); !errors.Is(err, errBroken) {
		t.Errorf("broken connection: %v", err)
	}
}

var errBroken = errors.New("connection broken")

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errBroken }

// The records must make a whole state.
func TestRestoreChecksTheState(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	fill(t, s, 1)
	var state bytes.Buffer
	state.Write(cluster.Marshal(archiveHead{Format: 1, Index: 7, Term: 2}))
	err := s.State().Snapshot().Records(func(table *cluster.Table, _ string, record any) error {
		if table.Name == cluster.TableSummaries {
			return nil
		}
		state.WriteByte(table.Record)
		state.Write(cluster.Marshal(record))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	before := s.State()
	_, err = s.RestoreArchive(t.Context(), bytes.NewReader(craftState(t, state.String(), nil)))
	if cluster.CodeOf(err) != cluster.CodeInvalid || !strings.Contains(err.Error(), "do not fit together") || strings.Contains(err.Error(), "\n") {
		t.Errorf("restore of a state without summaries: %v", err)
	}
	if s.State() != before {
		t.Error("the state was replaced")
	}
}

func TestRestoreGivesUpWithItsContext(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	mustApply(t, s, register("a"))
	b, _ := mustSave(t, s)
	want := dump(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.RestoreArchive(ctx, bytes.NewReader(b)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := s.SaveArchive(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, cluster.ErrNoLeader) {
		t.Error(err)
	}
	mustEqual(t, "after", dump(t, s), want)
}

// nomad finds the pinned nomad that `make nomad` builds, or one on PATH.
func nomad(t *testing.T) string {
	t.Helper()
	if path, err := filepath.Abs("../out/tools/nomad-1.11.1/nomad"); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path, err := exec.LookPath("nomad")
	if err != nil {
		t.Skip("no nomad on PATH; build the pinned one with: make nomad")
	}
	return path
}

func TestNomadInspectsArchive(t *testing.T) {
	program := nomad(t)
	s := mustOpen(t, t.TempDir())
	fill(t, s, 3)
	b, a := mustSave(t, s)
	path := filepath.Join(t.TempDir(), "backup.snap")
	mustWrite(t, path, string(b))
	out, err := exec.CommandContext(t.Context(), program, "operator", "snapshot", "inspect", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got := strings.Join(strings.Fields(string(out)), " ")
	for _, want := range []string{
		fmt.Sprintf("ID = %d-%d-%d", a.Term, a.Index, a.Created.UnixMilli()), fmt.Sprintf("Index = %d", a.Index),
		"Alloc 3", "Job 3", "Node 1", "Unknown(200) 1",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("output lacks %q", want)
		}
	}
	t.Logf("%s", out)
}

// readValue must end where the decoder does.
func FuzzReadValue(f *testing.F) {
	for _, seed := range []any{
		nil, true, 1, -1, 1 << 40, 1.5, "text", strings.Repeat("x", 300),
		[]byte{1},
		make([]byte, 300),
		[]any{1, "a", nil},
		map[string]any{"a": []int{1, 2}, "b": map[string]any{}},
		make([]int, 20), time.Unix(1, 2),
	} {
		f.Add(cluster.Marshal(seed))
	}
	f.Add([]byte{0xdd, 0, 0, 0, 2, 1, 2})
	f.Add([]byte{0xdf, 0, 0, 0, 1, 1, 2})
	f.Add([]byte{0xdd, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0xc7, 1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		h := &codec.MsgpackHandle{}
		h.Raw = true
		got, err := readValue(bufio.NewReader(bytes.NewReader(b)), nil, 1<<20)
		if n := valueSize(b); n != 0 && (err != nil || n != len(got)) {
			t.Fatalf("%x: %d bytes by the quick way, %d by the other, %v", b, n, len(got), err)
		}
		if err != nil {
			return
		}
		if !bytes.HasPrefix(b, got) || len(got) == 0 {
			t.Fatalf("%x is no beginning of %x", got, b)
		}
		d := codec.NewDecoderBytes(b, h)
		var v any
		if d.Decode(&v) == nil && d.NumBytesRead() != len(got) {
			t.Fatalf("%x: ended after %d bytes, the decoder after %d", b, len(got), d.NumBytesRead())
		}
	})
}

// FuzzVerifyArchive feeds any state.bin under right checksums.
func FuzzVerifyArchive(f *testing.F) {
	head := cluster.Marshal(archiveHead{Format: 1, Index: 7, Term: 2})
	f.Add(head)
	f.Add(append(bytes.Clone(head), 1, 0x80))
	f.Add(append(append(bytes.Clone(head), 3), cluster.Marshal(&cluster.Evaluation{ID: "e", Namespace: "default", JobID: "j"})...))
	f.Fuzz(func(t *testing.T, state []byte) {
		b := craftState(t, string(state), nil)
		if info, err := VerifyArchive(bytes.NewReader(b), 1<<22); err == nil {
			if info.Size != int64(len(state)) {
				t.Fatalf("size %d of %d bytes", info.Size, len(state))
			}
		} else if c := cluster.CodeOf(err); c != cluster.CodeInvalid && c != cluster.CodeTooLarge {
			t.Fatalf("%v has code %s", err, c)
		}
	})
}

func TestSealPrefix(t *testing.T) {
	b := craft(t, text("x", "y"))
	if !bytes.HasPrefix(b, sealPrefix) {
		t.Fatalf("archive begins with %x, not with %x", b[:len(sealPrefix)], sealPrefix)
	}
	if n := binary.LittleEndian.Uint16(sealPrefix[10:]); int(n) != 4+sha256.Size {
		t.Errorf("extra field of %d bytes", n)
	}
}
