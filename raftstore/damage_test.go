package raftstore

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// mustSeed gives random numbers that RXVISION_TEST_SEED repeats.
func mustSeed(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("RXVISION_TEST_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (RXVISION_TEST_SEED repeats it)", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// mustCopy copies a data folder.
func mustCopy(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

// mustHoldOrName opens a folder that may be damaged: it must say so, with the
// file's name and the way out, or hold exactly what it held.
func mustHoldOrName(t *testing.T, what, dir, file string, want map[string]string) (named bool) {
	t.Helper()
	cfg := testConfig(t, dir)
	cfg.Logger = slog.New(slog.DiscardHandler)
	s, err := Open(cfg)
	if err != nil {
		var damage *Damage
		if !errors.As(err, &damage) || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "rxvision server rebuild -data-dir "+dir) {
			t.Errorf("%s: %v", what, err)
		}
		return true
	}
	defer s.Close()
	eventually(t, what+": it leads or ends", func() bool { return s.IsLeader() || s.Err() != nil })
	if err := s.Err(); err != nil {
		t.Errorf("%s: ended only later: %v", what, err)
		return true
	}
	mustEqual(t, what, dump(t, s), want)
	return false
}

// Whichever byte of a log changes: it is noticed at the next start, or it was one
// that means nothing.
func TestFlippedByteInLog(t *testing.T) {
	random := mustSeed(t)
	trials := 20
	if os.Getenv("RXVISION_TEST_LONG") != "" {
		trials = 500
	}
	for _, kind := range []string{LogWAL, LogBbolt} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			s := mustOpen(t, dir, func(c *Config) { c.LogStore = kind })
			for i := range 12 {
				mustApply(t, s, register(fmt.Sprintf("job-%d", i)))
			}
			want := dump(t, s)
			mustClose(t, s)
			names, err := logFiles(dir)
			if err != nil || len(names) != 1 {
				t.Fatalf("log files %v, %v", names, err)
			}
			whole := mustRead(t, filepath.Join(dir, names[0]))
			flip := func(t *testing.T, bit byte, places ...int) (named bool) {
				t.Helper()
				folder := mustCopy(t, dir)
				changed := bytes.Clone(whole)
				for _, at := range places {
					changed[at] ^= bit
				}
				mustWrite(t, filepath.Join(folder, names[0]), string(changed))
				return mustHoldOrName(t, fmt.Sprintf("bit %#x of bytes %d of %d", bit, places, len(whole)), folder, strings.Split(names[0], "/")[0], want)
			}
			used := len(bytes.TrimRight(whole, "\x00"))
			named := 0
			for range trials {
				if flip(t, byte(1)<<random.IntN(8), random.IntN(used)) {
					named++
				}
			}
			t.Logf("%d of %d flips were named, the others changed nothing that counts", named, trials)
			// What an entry holds counts, in whichever of the file's pages it is read.
			for _, word := range []string{"job-0", "job-7", "job-11"} {
				var places []int
				for at := 0; ; {
					next := bytes.Index(whole[at:], []byte(word))
					if next < 0 {
						break
					}
					places = append(places, at+next)
					at += next + 1
				}
				if len(places) == 0 {
					t.Fatalf("%q is not in the log", word)
				}
				if !flip(t, byte(1)<<random.IntN(8), places...) {
					t.Errorf("%q was changed at bytes %d and nothing was said", word, places)
				}
			}
		})
	}
}

// A byte that changes in what was written since the last mark, as when the process
// was killed at once, is told from a torn write by the entries that follow it.
func TestFlippedByteBehindTheMark(t *testing.T) {
	random := mustSeed(t)
	dir := t.TempDir()
	s := mustOpen(t, dir)
	marked := string(mustRead(t, filepath.Join(dir, stableFile)))
	names, err := logFiles(dir)
	if err != nil || len(names) != 1 {
		t.Fatalf("log files %v, %v", names, err)
	}
	used := func() int {
		return len(bytes.TrimRight(mustRead(t, filepath.Join(dir, names[0])), "\x00"))
	}
	first := used()
	mustApply(t, s, register("first"))
	for i := range 12 {
		mustApply(t, s, register(fmt.Sprintf("job-%d", i)))
	}
	last := used()
	mustApply(t, s, register("last"))
	want := dump(t, s)
	killed := mustCopy(t, dir)
	mustWrite(t, filepath.Join(killed, stableFile), marked)
	whole := mustRead(t, filepath.Join(killed, names[0]))
	var heads []int // what raft-wal finds its way by
	for at := first; at < last; {
		heads = append(heads, at)
		kind, size := walFrame(whole, at)
		if kind == 0 {
			t.Fatalf("no frame at byte %d", at)
		}
		at += size
	}
	for trial := range 40 {
		at, bit := first+random.IntN(last-first), byte(1)<<random.IntN(8)
		if trial%2 == 0 {
			at = heads[random.IntN(len(heads))] + random.IntN(walFrameHead)
		}
		changed := bytes.Clone(whole)
		changed[at] ^= bit
		folder := mustCopy(t, killed)
		mustWrite(t, filepath.Join(folder, names[0]), string(changed))
		mustHoldOrName(t, fmt.Sprintf("bit %#x of byte %d of %d", bit, at, last), folder, strings.Split(names[0], "/")[0], want)
	}
	// The last write torn: its first page never came, or its end.
	for _, gap := range [][2]int{{last, last + 64}, {used() - 40, used()}} {
		torn := bytes.Clone(whole)
		clear(torn[gap[0]:gap[1]])
		folder := mustCopy(t, killed)
		mustWrite(t, filepath.Join(folder, names[0]), string(torn))
		back := mustOpen(t, folder)
		if !hasJob(back, "job-11") || hasJob(back, "last") {
			t.Errorf("bytes %d to %d torn: holds %v", gap[0], gap[1], dump(t, back))
		}
	}
}

// A log that lost its end, for whatever reason, is not taken for a shorter one.
func TestLogThatLostItsEnd(t *testing.T) {
	for _, kind := range []string{LogWAL, LogBbolt} {
		dir := t.TempDir()
		s := mustOpen(t, dir, func(c *Config) { c.LogStore = kind })
		before := mustCopy(t, dir)
		last := mustApply(t, s, register("late")).Index
		mustClose(t, s)
		names, err := logFiles(before)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			mustWrite(t, filepath.Join(dir, name), string(mustRead(t, filepath.Join(before, name))))
		}
		if _, err := Open(testConfig(t, dir)); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("although entries up to %d were stored", last)) {
			t.Errorf("%s: %v", kind, err)
		}
		for _, name := range names {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(testConfig(t, dir)); err == nil || !strings.Contains(err.Error(), "its end is missing") {
			t.Errorf("%s without its files: %v", kind, err)
		}
	}
}

// Damaged entries that a snapshot covers are dropped: nobody needs them.
func TestDamagedEntryBehindASnapshot(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir, inBbolt)
	bad := mustApply(t, s, register("a")).Index
	mustApply(t, s, register("b"))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, register("c"))
	want := dump(t, s)
	mustClose(t, s)
	editLog(t, dir, func(l logStore) {
		entry := packEntry(&raft.Log{Index: bad, Data: []byte("x")})
		entry[len(entry)-1]++
		err := l.(*boltLog).update(func(b *bbolt.Bucket) error { return b.Put(logKey(bad), entry) })
		if err != nil {
			t.Fatal(err)
		}
	})
	s = mustOpen(t, dir)
	mustEqual(t, "after the restart", dump(t, s), want)
	if first, err := s.disk.FirstIndex(); err != nil || first != bad+1 {
		t.Errorf("the log begins at %d, %v; want %d", first, err, bad+1)
	}
}

// Any one byte of the stable file may change: the other copy has it.
func TestFlippedByteInStable(t *testing.T) {
	random := mustSeed(t)
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	want, id := dump(t, s), s.ID()
	mustClose(t, s)
	whole := mustRead(t, filepath.Join(dir, stableFile))
	used := len(bytes.TrimRight(whole[:stableCopy], "\x00"))
	for range 10 {
		at := random.IntN(2)*stableCopy + random.IntN(used)
		folder := mustCopy(t, dir)
		flip(t, filepath.Join(folder, stableFile), at)
		if mustHoldOrName(t, fmt.Sprintf("byte %d", at), folder, stableFile, want) {
			t.Errorf("byte %d of one copy is fatal", at)
		}
	}
	mustWrite(t, filepath.Join(dir, idFile), "garbage") // the stable file knows
	s = mustOpen(t, dir)
	if s.ID() != id || string(mustRead(t, filepath.Join(dir, idFile))) != id+"\n" {
		t.Errorf("ID %s, want %s", s.ID(), id)
	}
	mustClose(t, s)
	flip(t, filepath.Join(dir, stableFile), used-1)
	flip(t, filepath.Join(dir, stableFile), stableCopy+used-1)
	if !mustHoldOrName(t, "both copies", dir, stableFile, want) {
		t.Error("both copies damaged, and it opened")
	}
}

// A write of the stable file that was torn anywhere leaves the old values or the new.
func TestTornStable(t *testing.T) {
	random := mustSeed(t)
	dir := t.TempDir()
	if err := createStable(dir, map[string][]byte{"vote": []byte("old")}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, stableFile)
	before := mustRead(t, path)
	s, err := openStable(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.put(map[string][]byte{"vote": []byte("new")}); err != nil {
		t.Fatal(err)
	}
	s.close()
	after := mustRead(t, path)
	for range 200 {
		done := random.IntN(2 * 100)
		torn := bytes.Clone(before)
		if done < 100 {
			copy(torn, after[:done]) // within the first copy
		} else {
			copy(torn, after[:stableCopy+done-100])
		}
		mustWrite(t, path, string(torn))
		for range 2 { // what was found once stays
			s, err := openStable(dir, false)
			if err != nil {
				t.Fatalf("torn at %d: %v", done, err)
			}
			got := string(s.get("vote"))
			s.close()
			if got != "old" && got != "new" || done >= 100 && got != "new" {
				t.Errorf("torn at %d: vote %q", done, got)
			}
		}
	}
}

// Snapshots: a flipped byte anywhere in the newer one's files costs nothing, in
// both ones' files it is named.
func TestFlippedByteInSnapshot(t *testing.T) {
	random := mustSeed(t)
	dir := t.TempDir()
	s := mustOpen(t, dir)
	for _, id := range []string{"a", "b"} {
		mustApply(t, s, register(id))
		if err := s.Snapshot(); err != nil {
			t.Fatal(err)
		}
	}
	want := dump(t, s)
	mustClose(t, s)
	list, err := listSnapshots(dir)
	if err != nil || len(list) != 2 {
		t.Fatalf("%d snapshots, %v", len(list), err)
	}
	damage := func(folder, id string) string {
		file := []string{snapFile, metaFile}[random.IntN(2)]
		path := filepath.Join(folder, snapFolder, id, file)
		size := len(mustRead(t, path))
		flip(t, path, random.IntN(size))
		return file
	}
	for i := range 8 {
		folder := mustCopy(t, dir)
		damage(folder, list[0].ID)
		if mustHoldOrName(t, fmt.Sprintf("newer snapshot %d", i), folder, "", want) {
			t.Error("the older snapshot and the log did not help")
		}
	}
	// Without the log that began it, only the snapshots are left.
	s = mustOpen(t, dir, func(c *Config) { c.TrailingLogs = 1 })
	mustApply(t, s, register("c"))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, register("d"))
	want = dump(t, s)
	mustClose(t, s)
	if list, err = listSnapshots(dir); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		folder := mustCopy(t, dir)
		file := damage(folder, list[0].ID)
		if !mustHoldOrName(t, fmt.Sprintf("needed snapshot %d", i), folder, file, want) {
			t.Error("it opened without the snapshot that it needs")
		}
	}
}

// A process ends while a segment is sealed: the last batch is whole and the next segment not made yet, or its index is there
// and its end is not.
func TestCrashWhileASegmentIsSealed(t *testing.T) {
	const size = 64 << 10
	quiet := slog.New(slog.DiscardHandler)
	entry := func(i uint64) *raft.Log { return &raft.Log{Index: i, Data: bytes.Repeat([]byte{byte(i)}, 5000)} }
	dir := t.TempDir()
	if err := createStable(dir, nil); err != nil {
		t.Fatal(err)
	}
	open := func(dir string) (*walLog, *stable) {
		st, err := openStable(dir, false)
		if err != nil {
			t.Fatal(err)
		}
		w, err := openWAL(dir, st, size, quiet, false)
		if err != nil {
			t.Fatal(err)
		}
		return w, st
	}
	stop := func(w *walLog, st *stable) {
		if err := errors.Join(w.Close(), st.close()); err != nil {
			t.Error(err)
		}
	}
	w, st := open(dir)
	var marks, sealed []byte
	var before, last uint64 // entries in front of the sealing batch, and with it
	for i := uint64(1); last == 0; i++ {
		marks = mustRead(t, filepath.Join(dir, stableFile))
		if err := w.StoreLog(entry(i)); err != nil {
			t.Fatal(err)
		}
		names, err := logFiles(dir)
		if err != nil {
			t.Fatal(err)
		}
		if b := mustRead(t, filepath.Join(dir, names[0])); len(b) > 0 {
			if _, entries, index := walWhole(b); index > 0 {
				sealed, before, last = b, entries-1, entries
			}
		}
	}
	stop(w, st)
	end, _, _ := walWhole(sealed)
	torn := bytes.Clone(sealed)
	clear(torn[end-walFrameHead:])
	for name, c := range map[string]struct {
		file []byte
		last uint64
	}{"whole": {sealed, last}, "torn": {torn, before}} {
		for _, change := range []string{"append", "shorten"} {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, walFolder), 0o700); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, filepath.Join(dir, stableFile), string(marks))
			mustWrite(t, filepath.Join(dir, walFolder, "00000000000000000001-0000000000000000.wal"), string(c.file))
			w, st := open(dir)
			last := c.last
			if got, err := w.LastIndex(); err != nil || got != last {
				t.Fatalf("%s: the log ends at %d, want %d (%v)", name, got, last, err)
			}
			if change == "shorten" {
				if err := w.DeleteRange(last, last); err != nil {
					t.Errorf("%s: shorten: %v", name, err)
				}
				last--
			}
			for range 2 { // and as the next start finds it
				for range 30 { // over several segments
					last++
					if err := w.StoreLog(entry(last)); err != nil {
						t.Fatalf("%s, %s: entry %d: %v", name, change, last, err)
					}
				}
				stop(w, st)
				w, st = open(dir)
				for i := uint64(1); i <= last; i++ {
					var l raft.Log
					if err := w.GetLog(i, &l); err != nil || l.Index != i || !bytes.Equal(l.Data, entry(i).Data) {
						t.Fatalf("%s, %s: entry %d is %d: %v", name, change, i, l.Index, err)
					}
				}
			}
			stop(w, st)
		}
	}
}

// A power failure tears the last write to a segment: pages of it are there, others not.
func TestTornLastWriteOfSegment(t *testing.T) {
	random := mustSeed(t)
	dir := t.TempDir()
	s := mustOpen(t, dir)
	acked := map[string]uint64{}
	for i := range 10 {
		id := fmt.Sprintf("acked-%d", i)
		acked[id] = mustApply(t, s, register(id)).Index
	}
	if err := s.disk.saveMark(s.progress()); err != nil {
		t.Fatal(err)
	}
	names, err := logFiles(dir)
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	before, marks := mustRead(t, filepath.Join(dir, names[0])), mustRead(t, filepath.Join(dir, stableFile))
	c := register("unacknowledged")
	c.Submission.Source = strings.Repeat("x", 30_000)
	late := mustApply(t, s, c)
	after := mustRead(t, filepath.Join(dir, names[0]))
	mustClose(t, s)
	const sector = 512
	for trial := range 15 {
		torn, complete := bytes.Clone(before), true
		for p := 0; p < len(after); p += sector {
			switch {
			case bytes.Equal(before[p:p+sector], after[p:p+sector]):
			case random.IntN(2) == 0:
				copy(torn[p:p+sector], after[p:p+sector])
			default:
				complete = false
			}
		}
		want := acked
		if trial == 0 || complete {
			torn, want = after, maps.Clone(acked)
			want["unacknowledged"] = late.Index
		}
		folder := t.TempDir()
		if err := os.Mkdir(filepath.Join(folder, walFolder), 0o700); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, filepath.Join(folder, stableFile), string(marks))
		mustWrite(t, filepath.Join(folder, names[0]), string(torn))
		mustHold(t, fmt.Sprintf("trial %d", trial), folder, want)
	}
}
