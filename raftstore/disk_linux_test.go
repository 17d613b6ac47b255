package raftstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/cluster"
)

// mustMountSmall returns a folder on a file system of its own.
func mustMountSmall(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a small file system (%v): run as root with CAP_SYS_ADMIN", err)
	}
	t.Cleanup(func() {
		eventually(t, "nothing is open any more", func() bool {
			runtime.GC() // raft leaves the file of a failed snapshot to the collector
			return unix.Unmount(dir, 0) == nil
		})
	})
	return dir
}

// A full disk: a clear error, nothing acknowledged is lost, and once there is
// space the store goes on by itself.
func TestFullDisk(t *testing.T) {
	disk := mustMountSmall(t, "44m")
	ballast := filepath.Join(disk, "ballast")
	mustWrite(t, ballast, strings.Repeat("x", 20<<20)) // a segment fits in, two do not
	dir := filepath.Join(disk, "server")
	s := mustOpen(t, dir, func(c *Config) {
		c.LeaderWait, c.segment = 300*time.Millisecond, walSegment
		c.SnapshotInterval, c.SnapshotThreshold = 20*time.Millisecond, 16 // snapshots fail too
	})
	acked := map[string]uint64{}
	err := fillDisk(t, s, acked)
	if cluster.CodeOf(err) != cluster.CodeUnavailable || !strings.Contains(err.Error(), "disk of the server's data folder "+dir+" is full") {
		t.Fatalf("on a full disk: %v", err)
	}
	for i := range 6 { // and again, while snapshots make and take room
		c := register(fmt.Sprintf("more-%d", i))
		c.Submission.Source = strings.Repeat("y", 500_000)
		if res, err := s.Apply(t.Context(), c); err == nil {
			acked[c.Job.ID] = res.Index
		} else if cluster.CodeOf(err) != cluster.CodeUnavailable {
			t.Fatalf("on a full disk: %v", err)
		}
	}
	if err := s.Err(); err != nil {
		t.Fatalf("the store ended: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, snapFolder, "*"+tmpSuffix)); err != nil || len(left) > 1 { // one may be under way
		t.Errorf("failed snapshots left %v, %v", left, err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store leads again", s.IsLeader)
	for id, index := range map[string]uint64{"later-1": 0, "later-2": 0} {
		eventually(t, "a write is stored again", func() bool {
			res, err := s.Apply(t.Context(), register(id))
			index = res.Index
			return err == nil
		})
		acked[id] = index
	}
	mustClose(t, s)
	mustHold(t, "after the restart", dir, acked)
}

// Closing and starting again while not a byte is free.
func TestFullDiskAtRestart(t *testing.T) {
	disk := mustMountSmall(t, "40m")
	dir := filepath.Join(disk, "server")
	reserve := filepath.Join(disk, "reserve")
	mustWrite(t, reserve, strings.Repeat("x", 18<<20))
	s := mustOpen(t, dir, func(c *Config) { c.LeaderWait, c.segment = time.Second, walSegment })
	acked := map[string]uint64{}
	if err := fillDisk(t, s, acked); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(disk, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	f.Close()
	mustClose(t, s)

	// It opens, or says that there is no space; it never invents or loses anything.
	s, err = Open(testConfig(t, dir))
	if err == nil {
		s.Close()
	} else if !strings.Contains(err.Error(), "no space left") {
		t.Errorf("open on a full disk: %v", err)
	}
	if err := os.Remove(reserve); err != nil {
		t.Fatal(err)
	}
	mustHold(t, "with space again", dir, acked)
}

// An archive that does not fit is refused and changes nothing.
func TestRestoreOnFullDisk(t *testing.T) {
	from := mustOpen(t, t.TempDir())
	for i := range 10 {
		c := register(string(rune('a' + i)))
		c.Submission.Source = strings.Repeat("x", 500_000)
		mustApply(t, from, c)
	}
	b, _ := mustSave(t, from)
	dir := filepath.Join(mustMountSmall(t, "5m"), "server")
	s := mustOpen(t, dir)
	mustApply(t, s, register("kept"))
	want := dump(t, s)
	if _, err := s.RestoreArchive(t.Context(), strings.NewReader(string(b))); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("restore of 5 MB on 5 MB: %v", err)
	}
	mustEqual(t, "after the restore that did not fit", dump(t, s), want)
	mustApply(t, s, register("next"))
	want = dump(t, s)
	mustClose(t, s)
	mustEqual(t, "after restart", dump(t, mustOpen(t, dir)), want)
}

// An fsync or read that fails leaves the disk in doubt: the store ends with the
// reason, and keeps it in the folder. The next start writes the log anew.
func TestBrokenDiskEndsTheStore(t *testing.T) {
	for _, kind := range []string{LogWAL, LogBbolt} {
		dir := t.TempDir()
		s := mustOpen(t, dir, func(c *Config) { c.LogStore = kind })
		acked := map[string]uint64{"a": mustApply(t, s, register("a")).Index}
		s.disk.entries.Close() // every access fails from now on
		if _, err := s.Apply(t.Context(), register("b")); cluster.CodeOf(err) != cluster.CodeUnavailable && cluster.CodeOf(err) != cluster.CodeNoLeader {
			t.Errorf("write on a broken disk: %v", err)
		}
		mustBeFatal(t, s, "write the log in "+dir)
		if state := s.DiskState(); state.OK || state.Since.IsZero() {
			t.Errorf("state of a broken disk: %+v", state)
		}
		if err := s.Close(); err == nil {
			t.Error("close does not tell")
		}
		if record := string(mustRead(t, filepath.Join(dir, failureFile))); !strings.Contains(record, "write the log in "+dir) {
			t.Errorf("recorded %s", record)
		}
		mustHold(t, "reopened", dir, acked)
		if _, err := os.Stat(filepath.Join(dir, failureFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the record of the failure is still there: %v", err)
		}
	}
}

// mustEnd waits for what must not take for ever.
func mustEnd(t *testing.T, what string, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatal(what + " does not end")
		return nil
	}
}

// mustStepDown opens a store whose disk is full until raft steps down; while it begins
// to lead again, writing its first entry fails with err.
func mustStepDown(t *testing.T, err error) (s *Store, failed <-chan struct{}) {
	var fails atomic.Bool
	begins := make(chan struct{})
	var once sync.Once
	s = mustOpen(t, t.TempDir(), func(c *Config) {
		c.Heartbeat = 100 * time.Millisecond
		c.fault = func(op string) error {
			switch {
			case !fails.Load():
				return nil
			case op == "append": // the leader steps down
				return &os.PathError{Op: "write", Path: "the log", Err: syscall.ENOSPC}
			case s.raft.State() == raft.Leader: // it is one again
				once.Do(func() { close(begins) })
				return err
			}
			return nil
		}
	})
	mustApply(t, s, register("a"))
	fails.Store(true)
	if _, err := s.Apply(t.Context(), register("b")); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("write on a full disk: %v", err)
	}
	return s, begins
}

// The disk fails with the first entry of a new term. What raft is asked then it never
// answers: everyone who waits for it gets the reason, and closing ends.
func TestBrokenDiskWhileLeadershipBegins(t *testing.T) {
	s, _ := mustStepDown(t, &os.PathError{Op: "sync", Path: "the log", Err: syscall.EIO})
	mustBeFatal(t, s, "input/output error")
	autopilot := pilotRaft{s.raft, s}
	for what, ask := range map[string]func() error{
		"write": func() error { return s.note(t.Context(), register("c")) },
		"round": func() error {
			p := &proposal{entries: [][]byte{{1}}, answer: make(chan []outcome, 1)}
			s.propose([]*proposal{p})
			return (<-p.answer)[0].err
		},
		"barrier":  s.barrier,
		"snapshot": func() error { return s.settle(func() error { return s.raft.Snapshot().Error() }) },
		"restore": func() error {
			return s.settle(func() error { return s.raft.Restore(&raft.SnapshotMeta{}, strings.NewReader(""), 0) })
		},
		"new voter":   func() error { return autopilot.AddVoter("x", "127.0.0.1:1", 0, 0).Error() },
		"new server":  func() error { return autopilot.AddNonvoter("x", "127.0.0.1:1", 0, 0).Error() },
		"lost vote":   func() error { return autopilot.DemoteVoter("x", 0, 0).Error() },
		"lost server": func() error { return autopilot.RemoveServer("x", 0, 0).Error() },
		"new leader":  func() error { return autopilot.LeadershipTransferToServer("x", "127.0.0.1:1").Error() },
		"transfer":    func() error { return s.transferHere("") },
		"new cluster": func() error {
			return s.settle(func() error { return s.raft.BootstrapCluster(raft.Configuration{}).Error() })
		},
		"linearizable": func() error { return s.ReadIndex(t.Context(), true) },
	} {
		if err := mustEnd(t, what, ask); !errors.Is(err, s.Err()) {
			t.Errorf("%s: %v, want %v", what, err, s.Err())
		}
	}
	if err := mustEnd(t, "close", s.Close); !errors.Is(err, s.Err()) {
		t.Errorf("close: %v", err)
	}
}

// Closing while the first entry of a term waits for room: nothing has failed.
func TestCloseOnFullDiskWhileLeadershipBegins(t *testing.T) {
	s, begins := mustStepDown(t, &os.PathError{Op: "write", Path: "the log", Err: syscall.ENOSPC})
	select {
	case <-begins:
	case <-time.After(patience):
		t.Fatal("does not lead again")
	}
	if err := mustEnd(t, "close", s.Close); err != nil {
		t.Errorf("close: %v", err)
	}
}

// On a disk that is nearly full term and vote can still be written, in place: only an
// entry that fits, or the probe, says that there is room again.
func TestNearlyFullDisk(t *testing.T) {
	dir := t.TempDir()
	log := testConfig(t, dir).Logger
	st, err := openOrCreateStable(dir, LogBbolt)
	if err != nil {
		t.Fatal(err)
	}
	var refused atomic.Int32
	d := &disk{
		stable: st, log: log, dir: dir, appends: appendSeconds(), writes: map[int]time.Time{}, patience: time.Hour,
		fault: func(string) error {
			if refused.Add(-1) < 0 {
				return nil
			}
			return &os.PathError{Op: "write", Path: "the log", Err: syscall.ENOSPC}
		},
	}
	if d.entries, err = openLog(LogBbolt, dir, st, 0, log, false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.close() })
	d.running.Store(true)
	d.voters.Store(1)
	store := func(kind raft.LogType, index uint64) func() error {
		return func() error { return d.StoreLog(&raft.Log{Index: index, Term: 1, Type: kind}) }
	}
	setTerm := func() error { return d.SetUint64([]byte("CurrentTerm"), 1) }
	for _, c := range []struct {
		what        string
		write       func() error
		refuse      int32
		fails, full bool
	}{
		{"an entry that is refused", store(raft.LogCommand, 1), 1, true, true},
		{"a term", setTerm, 0, false, true},
		{"a lone leader's first entry", store(raft.LogNoop, 1), 0, false, true},
		{"an entry that fits", store(raft.LogCommand, 2), 0, false, false},
		{"a term that is refused at first", setTerm, 1, false, true},
	} {
		refused.Store(c.refuse)
		err := c.write()
		if (err != nil) != c.fails || d.isFull() != c.full {
			t.Errorf("after %s: %v, full %v, want %v", c.what, err, d.isFull(), c.full)
		}
	}
}

// A disk that fails and then takes no writes any more: the process ends, comes
// back for reading, and goes on by itself when the disk does.
func TestReadOnlyUntilTheDiskRecovers(t *testing.T) {
	for _, kind := range []string{LogWAL, LogBbolt} {
		t.Run(kind, func(t *testing.T) {
			disk := mustMountSmall(t, "64m")
			dir := filepath.Join(disk, "server")
			registry := prometheus.NewRegistry()
			cfg := testConfig(t, dir)
			var fails atomic.Bool
			cfg.LogStore, cfg.Registerer = kind, registry
			cfg.fault = func(string) error {
				if fails.Load() {
					return &os.PathError{Op: "sync", Path: "the log", Err: syscall.EIO}
				}
				return nil
			}
			s := mustOpen(t, dir, func(c *Config) { *c = cfg })
			fill(t, s, 3)
			if err := s.Snapshot(); err != nil {
				t.Fatal(err)
			}
			acked := map[string]uint64{"late": mustApply(t, s, register("late")).Index}
			want := dump(t, s)
			if err := s.disk.saveMark(s.progress()); err != nil { // as it is every second
				t.Fatal(err)
			}
			fails.Store(true)
			if _, err := s.Apply(t.Context(), register("lost")); err == nil {
				t.Error("a write was acknowledged whose sync failed")
			}
			mustBeFatal(t, s, "input/output error")
			if err := s.Close(); err == nil {
				t.Error("close does not tell")
			}
			remount := func(flags uintptr) {
				t.Helper()
				if err := unix.Mount("", disk, "", unix.MS_REMOUNT|flags, ""); err != nil {
					t.Fatal(err)
				}
			}
			remount(unix.MS_RDONLY)
			_, err := Open(cfg)
			var broken *Unwritable
			if !errors.As(err, &broken) || !strings.Contains(err.Error(), "input/output error") || !errors.Is(err, syscall.EROFS) {
				t.Fatalf("open on a disk that takes no writes: %v", err)
			}
			frozen, err := OpenReadOnly(cfg, broken)
			if err != nil {
				t.Fatal(err)
			}
			mustEqual(t, "for reading", dumpState(t, frozen.State()), want)
			if _, err := frozen.Apply(t.Context(), register("x")); cluster.CodeOf(err) != cluster.CodeUnavailable || !strings.Contains(err.Error(), "read-only") {
				t.Errorf("write while read-only: %v", err)
			}
			if servers, _, err := frozen.Servers(); err != nil || len(servers) != 1 || servers[0].ID != frozen.ID() || frozen.DiskState().OK {
				t.Errorf("servers %v, %v, disk %+v", servers, err, frozen.DiskState())
			}
			if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "in use by another") {
				t.Errorf("opened twice: %v", err)
			}
			archive, err := frozen.SaveArchive(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := VerifyArchive(archive, 0); err != nil {
				t.Error(err)
			}
			if err := archive.Close(); err != nil {
				t.Error(err)
			}
			select {
			case <-frozen.Recovered():
				t.Error("recovered by itself on a read-only file system")
			default:
			}
			remount(0)
			select {
			case <-frozen.Recovered():
			case <-time.After(patience):
				t.Fatal("does not notice that the disk works again")
			}
			if err := frozen.Close(); err != nil {
				t.Error(err)
			}
			mustHold(t, "after the recovery", dir, acked)
		})
	}
}

// A write that does not end: the server says so, and takes no part in elections.
func TestStalledDisk(t *testing.T) {
	var stalls atomic.Bool
	entered, release := make(chan struct{}), make(chan struct{})
	s := mustOpen(t, t.TempDir(), func(c *Config) {
		c.fault = func(op string) error {
			if op == "append" && stalls.Load() {
				entered <- struct{}{}
				<-release
			}
			return nil
		}
	})
	stalls.Store(true)
	done := make(chan error)
	go func() { done <- second(s.Apply(t.Context(), register("slow"))) }()
	<-entered
	eventually(t, "the stall is seen", func() bool { return !s.DiskState().OK })
	g := &gate{NetworkTransport: nil, disk: s.disk}
	for name, err := range map[string]error{ // each is refused before the network is asked
		"heartbeat": g.AppendEntries("", "", nil, nil),
		"vote":      g.RequestVote("", "", nil, nil),
		"pre-vote":  g.RequestPreVote("", "", nil, nil),
	} {
		if err == nil || !strings.Contains(err.Error(), "has not ended for") {
			t.Errorf("%s: %v", name, err)
		}
	}
	stalls.Store(false)
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if state := s.DiskState(); !state.OK {
		t.Errorf("after the stall: %+v", state)
	}
}
