package raftstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/cluster"
)

func TestSnapshotBesideWrites(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir, func(c *Config) { c.TrailingLogs = 1 })
	fill(t, s, 20)
	var group sync.WaitGroup
	stop := make(chan struct{})
	group.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				mustApply(t, s, register(fmt.Sprintf("beside-%d", i)))
			}
		}
	})
	for range 5 {
		if err := s.Snapshot(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	group.Wait()
	want := dump(t, s)
	if s.Stats()["last_snapshot_index"] == "0" {
		t.Error("no snapshot was taken")
	}
	mustClose(t, s)
	if left, err := os.ReadDir(filepath.Join(dir, tmpFolder)); err != nil || len(left) > 0 {
		t.Errorf("left in the folder for temporary files: %v, %v", left, err)
	}
	mustEqual(t, "after restart", dump(t, mustOpen(t, dir)), want)
}

func TestManyBytesMakeASnapshotDue(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	s.fsm.mu.Lock()
	s.fsm.bytes = snapshotBytes // as if so much had been applied
	s.fsm.mu.Unlock()
	last := mustApply(t, s, register("a"))
	eventually(t, "a snapshot is taken", func() bool { return s.Stats()["last_snapshot_index"] == fmt.Sprint(last.Index) })
}

func TestSnapshotLeavesNothingWhenItFails(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	snaps, err := openSnapshots(dir, s.log)
	if err != nil {
		t.Fatal(err)
	}
	sink, err := snaps.Create(raft.SnapshotVersionMax, 9, 2, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	view, err := s.fsm.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	close(stopped)
	view.(*persister).fsm = newFSM("", "", nil, nil, stopped)
	if err := view.Persist(sink); !errors.Is(err, errStopped) {
		t.Errorf("a snapshot that is stopped: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, snapFolder)); err != nil || len(left) > 0 {
		t.Errorf("left in the snapshot folder: %v, %v", left, err)
	}
	mustApply(t, s, register("b")) // goes on
}

// A newer snapshot that cannot be read is replaced by the older one and the log.
func TestDamagedSnapshotFallsBack(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	for _, id := range []string{"b", "c"} {
		if err := s.Snapshot(); err != nil {
			t.Fatal(err)
		}
		mustApply(t, s, register(id))
	}
	want := dump(t, s)
	mustClose(t, s)
	flip(t, newestSnapshot(t, dir), 5000)
	s = mustOpen(t, dir)
	mustEqual(t, "from the older snapshot", dump(t, s), want)
	mustClose(t, s)

	// Without any that can be read, and with the log that began it cut off, nothing is invented.
	list, err := filepath.Glob(filepath.Join(dir, snapFolder, "*", snapFile))
	if err != nil || len(list) != 2 {
		t.Fatalf("snapshots %v, %v", list, err)
	}
	for _, path := range list {
		if path != newestSnapshot(t, dir) {
			flip(t, path, 5000)
		}
	}
	if s, err := Open(testConfig(t, dir)); err == nil || !strings.Contains(err.Error(), "failed to load any existing snapshots") {
		t.Errorf("open gave %v, %v", s, err)
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReadSnapshotFindsFaults(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	fill(t, s, 2)
	bucket := func(tx *bbolt.Tx, name string) *bbolt.Bucket { return tx.Bucket([]byte(name)) }
	first := func(b *bbolt.Bucket) (k, v []byte) {
		k, v = b.Cursor().First()
		return k, append([]byte(nil), v...)
	}
	for _, c := range []struct {
		name  string
		fault func(tx *bbolt.Tx) error
		want  string
	}{
		{"none", func(*bbolt.Tx) error { return nil }, ""},
		{"record changed", func(tx *bbolt.Tx) error {
			k, v := first(bucket(tx, cluster.TableJobs))
			v[10] ^= 1
			return bucket(tx, cluster.TableJobs).Put(k, v)
		}, "table jobs: record \"default\\x00job-0\" is damaged"},
		{"record under another key", func(tx *bbolt.Tx) error {
			_, v := first(bucket(tx, cluster.TableJobs))
			return bucket(tx, cluster.TableJobs).Put([]byte("other"), v)
		}, "is damaged"},
		{"record too short", func(tx *bbolt.Tx) error { return bucket(tx, cluster.TableJobs).Put([]byte("other"), []byte{1}) }, "is damaged"},
		{"record missing", func(tx *bbolt.Tx) error {
			k, _ := first(bucket(tx, cluster.TableEvals))
			return bucket(tx, cluster.TableEvals).Delete(k)
		}, "table evals holds 1 records, its count says 2"},
		{"table missing", func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(cluster.TableEvals)) }, "table evals holds 0 records"},
		{"rules broken", func(tx *bbolt.Tx) error {
			k, _ := first(bucket(tx, cluster.TableSummaries))
			return errors.Join(bucket(tx, metaBucket).Put([]byte(countPrefix+cluster.TableSummaries), []byte("1")),
				bucket(tx, cluster.TableSummaries).Delete(k))
		}, "has no summary"},
		{"newer table", func(tx *bbolt.Tx) error { return bucket(tx, metaBucket).Put([]byte("count/futures"), []byte("3")) }, "table futures is not known"},
		{"newer format", func(tx *bbolt.Tx) error { return bucket(tx, metaBucket).Put([]byte("format"), []byte("3")) }, `format "3"`},
		{"no meta", func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(metaBucket)) }, "has no meta bucket"},
		{"index is no number", func(tx *bbolt.Tx) error { return bucket(tx, metaBucket).Put([]byte("index"), []byte("x")) }, "meta index"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "snap")
			if err := writeSnapshot(path, s.State().Snapshot(), snapshotHead{Index: 9, Term: 2, CreatedBy: "me"}, nil, nil); err != nil {
				t.Fatal(err)
			}
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Update(c.fault); err != nil {
				t.Fatal(err)
			}
			db.Close()
			_, head, err := readSnapshot(path)
			switch {
			case c.want == "" && (err != nil || head != snapshotHead{Index: 9, Term: 2, CreatedBy: "me"}):
				t.Errorf("head %+v, %v", head, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// A large state is written in several transactions.
func TestSnapshotOfManyBatches(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	for i := range 6 {
		c := register(fmt.Sprintf("big-%d", i))
		c.Submission.Source = strings.Repeat(fmt.Sprint(i), 900_000)
		mustApply(t, s, c)
	}
	path := filepath.Join(t.TempDir(), "snap")
	if err := writeSnapshot(path, s.State().Snapshot(), snapshotHead{}, nil, nil); err != nil {
		t.Fatal(err)
	}
	state, _, err := readSnapshot(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		sub := state.Snapshot().Submission(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: fmt.Sprintf("big-%d", i)}, 0)
		if sub == nil || len(sub.Source) != 900_000 || sub.Source[0] != byte('0'+i) {
			t.Errorf("submission %d is not what was written", i)
		}
	}
}

// Raft has installed a snapshot that cannot be read: the state stays, and the
// store ends instead of going on beside its log.
func TestRestoreThatFailsWhileRunning(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	mustApply(t, s, register("a"))
	want := dump(t, s)
	path := filepath.Join(t.TempDir(), "snap")
	mustWrite(t, path, strings.Repeat("no snapshot ", 1000))
	if err := s.fsm.Restore(snapshotSource{path: path}); err != nil {
		t.Errorf("raft would panic on: %v", err)
	}
	mustBeFatal(t, s, "restore snapshot")
	mustEqual(t, "after the failed restore", dump(t, s), want)
	if _, err := s.SaveArchive(t.Context()); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("archive of a failed store: %v", err)
	}
}

// A large state is written anew only when as much has been applied as it has.
func TestLargeSnapshotsComeLessOften(t *testing.T) {
	s := mustOpen(t, t.TempDir(), func(c *Config) { c.SnapshotInterval = time.Hour })
	mustApply(t, s, register("a"))
	s.fsm.wrote(3 * snapshotBytes) // as if the last one had been so large
	eventually(t, "raft's own rule follows", func() bool {
		return s.raft.ReloadableConfig().SnapshotThreshold == 3*s.cfg.SnapshotThreshold
	})
	s.fsm.mu.Lock()
	s.fsm.bytes = 2 * snapshotBytes
	s.fsm.mu.Unlock()
	if s.fsm.snapshotDue() {
		t.Error("a snapshot is due when a third of the state is left to apply")
	}
	if err := s.Snapshot(); err != nil { // a small one again
		t.Fatal(err)
	}
	eventually(t, "raft's own rule follows back", func() bool {
		return s.raft.ReloadableConfig().SnapshotThreshold == s.cfg.SnapshotThreshold
	})
	s.fsm.mu.Lock()
	s.fsm.bytes = snapshotBytes
	s.fsm.mu.Unlock()
	if !s.fsm.snapshotDue() {
		t.Error("no snapshot is due")
	}
}

// TestPaceGivesWay works in virtual time, beside writes that come seldom and then no more.
func TestPaceGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, index := time.Now(), uint64(0)
		p := &pace{applied: func() uint64 { return index }}
		work := func(chunks int) (rested time.Duration) {
			for range chunks {
				time.Sleep(time.Millisecond)
				before := time.Now()
				p.did(paceBytes)
				rested += time.Since(before)
				index = max(index, uint64(min(time.Since(began), time.Second)/(20*time.Millisecond)))
			}
			return rested
		}
		work(30) // until it has seen a write
		if rested := work(200); rested != 200*paceShare*time.Millisecond {
			t.Errorf("rested for %s beside writes", rested)
		}
		time.Sleep(time.Second)
		work(2)
		time.Sleep(paceQuiet)
		if rested := work(200); rested != 0 {
			t.Errorf("rested for %s beside none", rested)
		}
	})
}

// TestTempFileIsNotLeftDirty writes many batches: what the disk does not have of them yet is bounded.
func TestTempFileIsNotLeftDirty(t *testing.T) {
	f, err := tempFile(t.TempDir(), "temp-")
	if err != nil {
		t.Fatal(err)
	}
	defer f.remove()
	for range 64 {
		if _, err := f.Write(make([]byte, snapshotBatch/4)); err != nil {
			t.Fatal(err)
		}
	}
	var cached unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &cached, 0); err != nil {
		t.Skipf("the kernel does not tell what is cached of a file, run on Linux 6.5 or newer: %v", err)
	}
	if left := (cached.Dirty + cached.Writeback) * uint64(os.Getpagesize()); left > snapshotBatch {
		t.Errorf("%d bytes are not on the disk", left)
	}
}
