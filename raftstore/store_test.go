package raftstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

func TestRestartKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	fill(t, s, 5)
	want, id := dump(t, s), s.ID()
	mustClose(t, s)

	s = mustOpen(t, dir)
	mustEqual(t, "from the log", dump(t, s), want)
	if s.ID() != id {
		t.Errorf("server ID changed from %s to %s", id, s.ID())
	}
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	last := mustApply(t, s, register("after"))
	want = dump(t, s)
	mustClose(t, s)

	s = mustOpen(t, dir)
	mustEqual(t, "from snapshot and log", dump(t, s), want)
	if next := mustApply(t, s, register("next")); next.Index <= last.Index {
		t.Errorf("index went from %d to %d", last.Index, next.Index)
	}
}

func TestApplyAnswersWithTheRulesError(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	first := register("a")
	first.EnforceIndex = true
	res := mustApply(t, s, first)
	if res.Index == 0 || res.JobModifyIndex != res.Index || first.RequestID == "" || first.Time == 0 {
		t.Errorf("result %+v, stamp %+v", res, first.Stamp)
	}
	second := register("a")
	second.EnforceIndex = true
	before := dump(t, s)
	if _, err := s.Apply(t.Context(), second); cluster.CodeOf(err) != cluster.CodeConflict {
		t.Errorf("second registration: %v", err)
	}
	after := dump(t, s)
	for _, m := range []map[string]string{before, after} { // the answer itself is kept
		maps.DeleteFunc(m, func(k, _ string) bool {
			return strings.HasPrefix(k, cluster.TableResults) || strings.HasPrefix(k, cluster.TableIndex)
		})
	}
	mustEqual(t, "refused command", after, before)
	// The same request again gives the first answer.
	if again := mustApply(t, s, first); again.Index != res.Index || again.EvalID != res.EvalID {
		t.Errorf("repeated request: %+v, want %+v", again, res)
	}
}

func TestEntrySize(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	fitting := func(source int) *cluster.RegisterJob {
		c := register("big")
		c.RequestID, c.Time, c.Submission.Source = newUUID(), 1, strings.Repeat("x", source)
		return c
	}
	room := MaxEntry - len(seal(cluster.EncodeCommand(fitting(1<<19)))) + 1<<19
	mustApply(t, s, fitting(room))
	_, err := s.Apply(t.Context(), fitting(room+1))
	if cluster.CodeOf(err) != cluster.CodeTooLarge {
		t.Errorf("one byte over the limit: %v", err)
	}
}

func TestConcurrentApplies(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	var mu sync.Mutex
	indexes := map[uint64]string{}
	var group sync.WaitGroup
	for w := range 16 {
		group.Go(func() {
			for i := range 20 {
				id := fmt.Sprintf("c-%d-%d", w, i)
				res, err := s.Apply(t.Context(), register(id))
				if err != nil {
					t.Error(err)
					return
				}
				snap, err := s.SnapshotMinIndex(t.Context(), res.Index)
				if err != nil || snap.Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: id}) == nil {
					t.Errorf("job %s is not in the snapshot of its index: %v", id, err)
				}
				mu.Lock()
				if other := indexes[res.Index]; other != "" {
					t.Errorf("%s and %s have index %d", id, other, res.Index)
				}
				indexes[res.Index] = id
				mu.Unlock()
			}
		})
	}
	group.Wait()
}

func TestInFlightIsBounded(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	s.fsm.mu.Lock() // nothing is applied from now on
	var group sync.WaitGroup
	for i := range maxInFlight/minWeight + 100 {
		group.Go(func() {
			if _, err := s.Apply(t.Context(), register(fmt.Sprintf("bounded-%d", i))); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "there is no room for one more", func() bool {
		if s.weight.TryAcquire(1) {
			s.weight.Release(1)
			return false
		}
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Apply(ctx, register("late")); err == nil || !strings.Contains(err.Error(), "wait for earlier writes") {
		t.Errorf("over the bound: %v", err)
	}
	s.fsm.mu.Unlock()
	group.Wait()
	if !s.weight.TryAcquire(maxInFlight) {
		t.Error("room is lost")
	}
}

func TestApplyGivesUpWithItsContext(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Apply(ctx, register("a")); !errors.Is(err, context.Canceled) {
		t.Errorf("apply with an ended context: %v", err)
	}
	if _, err := s.SnapshotMinIndex(ctx, 1<<40); !errors.Is(err, context.Canceled) {
		t.Errorf("wait with an ended context: %v", err)
	}
}

// loseQuorum adds a voter that nobody runs, so that the leader steps down.
func loseQuorum(t *testing.T, s *Store) {
	t.Helper()
	s.raft.AddVoter(raft.ServerID(newUUID()), "127.0.0.1:1", 0, 0)
	eventually(t, "the leader steps down", func() bool { return !s.IsLeader() })
}

func TestNoLeader(t *testing.T) {
	s := mustOpen(t, t.TempDir(), func(c *Config) { c.LeaderWait = 50 * time.Millisecond })
	news := s.LeaderCh(t.Context())
	if !<-news {
		t.Error("the first news is not that this server leads")
	}
	loseQuorum(t, s)
	if <-news {
		t.Error("the news is not that leadership is lost")
	}
	if _, err := s.Apply(t.Context(), register("a")); !errors.Is(err, cluster.ErrNoLeader) {
		t.Errorf("apply without a leader: %v", err)
	}
	if _, err := s.RestoreArchive(t.Context(), strings.NewReader("")); !errors.Is(err, cluster.ErrNoLeader) {
		t.Errorf("restore without a leader: %v", err)
	}
	if _, err := s.SaveArchive(t.Context()); !errors.Is(err, cluster.ErrNoLeader) {
		t.Errorf("save without a leader: %v", err)
	}
	if id, addr := s.Leader(); id != "" || addr != "" {
		t.Errorf("leader is %s at %s", id, addr)
	}
}

func TestCloseEndsWhatWaits(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	loseQuorum(t, s)
	news, state := s.LeaderCh(t.Context()), s.State().Snapshot()
	errs := make(chan error, 2)
	go func() { _, err := s.Apply(context.Background(), register("a")); errs <- err }()
	go func() { _, err := s.SnapshotMinIndex(context.Background(), 1<<40); errs <- err }()
	mustClose(t, s)
	for range 2 {
		if err := <-errs; cluster.CodeOf(err) != cluster.CodeUnavailable && !errors.Is(err, cluster.ErrNoLeader) {
			t.Errorf("after close: %v", err)
		}
	}
	for range news { // ends only if it is closed
	}
	<-state.Abandoned()
	if _, err := s.Apply(context.Background(), register("a")); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("apply after close: %v", err)
	}
}

func TestLeaderChConflates(t *testing.T) {
	var l leadership
	l.init()
	ch, cancel := l.subscribe()
	other, cancelOther := l.subscribe()
	if <-ch || <-other {
		t.Error("leads from the start")
	}
	l.set(true)
	if !<-ch {
		t.Error("did not hear of leadership")
	}
	l.set(false)
	l.set(true)
	if !<-ch { // true after true: lost and won again
		t.Error("the newest news is lost")
	}
	cancelOther()
	cancelOther()
	l.set(false)
	if _, open := <-other; !open {
		t.Error("the last news before the end is lost")
	}
	cancel()
	l.close()
	late, _ := l.subscribe()
	if _, open := <-late; open {
		t.Error("a closed store has news")
	}
}

func TestMembers(t *testing.T) {
	dir := t.TempDir()
	reg := prometheus.NewRegistry()
	s := mustOpen(t, dir, func(c *Config) { c.Registerer = reg })
	mustApply(t, s, register("a"))
	check := func(s *Store) {
		t.Helper()
		servers, index, err := s.Servers()
		want := Server{ID: s.ID(), Name: "test", Address: s.Addr(), Leader: true, Voter: true}
		if err != nil || len(servers) != 1 || servers[0] != want || index == 0 {
			t.Errorf("servers %+v at %d, %v; want %+v", servers, index, err, want)
		}
		if id, addr := s.Leader(); id != s.ID() || addr != s.Addr() {
			t.Errorf("leader %s at %s", id, addr)
		}
		if d := s.LastContact(); d != 0 {
			t.Errorf("last contact %s", d)
		}
		var stats map[string]string
		eventually(t, "all is applied", func() bool { stats = s.Stats(); return stats["applied_index"] == stats["last_log_index"] })
		if stats["state"] != "Leader" || stats["num_peers"] != "0" || stats["latest_configuration_index"] != fmt.Sprint(index) {
			t.Errorf("stats %v", stats)
		}
	}
	check(s)
	families, err := reg.Gather()
	if err != nil || len(families) < 7 {
		t.Errorf("%d metric families, %v", len(families), err)
	}
	first := s.Addr()
	mustClose(t, s)
	taken, err := net.Listen("tcp", first)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	check(mustOpen(t, dir, func(c *Config) { c.Registerer = reg })) // another port, the same registry
}

func TestOpenRefuses(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"folder in use", func(c *Config) { c.Dir = s.cfg.Dir }, "is in use by another rxvision server"},
		{"port in use", func(c *Config) { c.Bind = s.Addr() }, "is taken by another program"},
		{"bad address", func(c *Config) { c.Bind = "nonsense" }, "raft address nonsense"},
		{"no address to tell", func(c *Config) { c.Bind = "0.0.0.0:0" }, "raft address 0.0.0.0:0"},
		{"nothing to begin with", func(c *Config) { c.BootstrapExpect = 0 }, "holds no server yet"},
		{"a file", func(c *Config) { c.Dir = filepath.Join(s.cfg.Dir, idFile) }, "not a directory"},
		{"log without the rest", func(c *Config) { mustWrite(t, filepath.Join(c.Dir, boltLogFile), "log") }, "stable: the file with term and vote is damaged: it is missing"},
		{"folder of an early version", func(c *Config) { mustWrite(t, filepath.Join(c.Dir, "raft.db"), "log") }, "made by a development version before 0.1"},
		{"unknown log store", func(c *Config) { c.LogStore = "tape" }, `log store "tape" is not known; it can be wal or bbolt`},
		{"metrics twice", func(c *Config) {
			c.Registerer = prometheus.NewRegistry()
			c.Registerer.MustRegister(newMetrics(s).size)
		}, "register metrics"},
		{"no logger", func(c *Config) { c.Logger = nil }, "must be set"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig(t, t.TempDir())
			c.change(&cfg)
			got, err := Open(cfg)
			if err == nil {
				got.Close()
				t.Fatal("was opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q lacks %q", err, c.want)
			}
		})
	}
}

func mustWrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestUnknownCommandStopsTheStore(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustApply(t, s, register("a"))
	want := dump(t, s)
	if out, _, err := s.proposeFor(t.Context(), seal([]byte{250, 0x80})); err != nil || out[0].err == nil {
		t.Fatal("an entry of an unknown kind was applied")
	}
	mustBeFatal(t, s, "kind 250")
	mustEqual(t, "after the unknown entry", dump(t, s), want)
	if err := s.Close(); err == nil || !strings.Contains(err.Error(), "kind 250") {
		t.Errorf("close: %v", err)
	}
	// A restart meets the entry again.
	s, err := Open(testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	mustBeFatal(t, s, "kind 250")
	mustEqual(t, "after restart", dump(t, s), want)
}

// mustBeFatal waits for the store's end for that reason.
func mustBeFatal(t *testing.T, s *Store, why string) {
	t.Helper()
	select {
	case err := <-s.Fatal():
		if !strings.Contains(err.Error(), why) {
			t.Errorf("fatal: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the store did not end")
	}
	for _, err := range []error{s.Err(), second(s.Apply(t.Context(), register("late"))), s.Snapshot(), second(s.SnapshotMinIndex(t.Context(), 1<<40))} {
		if cluster.CodeOf(err) != cluster.CodeUnavailable || !strings.Contains(err.Error(), why) {
			t.Errorf("after the end: %v", err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// inBbolt makes the log one that editLog can change anywhere.
func inBbolt(c *Config) { c.LogStore = LogBbolt }

// editLog changes the log of a closed store.
func editLog(t *testing.T, dir string, edit func(logStore)) {
	t.Helper()
	db, err := openBoltLog(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	edit(db)
}

func TestDamagedEntryStopsTheStore(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"changed": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"cut":     func(b []byte) []byte { return b[:3] },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := mustOpen(t, dir, inBbolt)
			good := mustApply(t, s, register("good"))
			bad := mustApply(t, s, register("bad"))
			mustClose(t, s)
			editLog(t, dir, func(db logStore) {
				var l raft.Log
				if err := db.GetLog(bad.Index, &l); err != nil {
					t.Fatal(err)
				}
				l.Data = damage(l.Data)
				if err := db.StoreLog(&l); err != nil {
					t.Fatal(err)
				}
			})
			s, err := Open(testConfig(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			mustBeFatal(t, s, fmt.Sprintf("apply log index %d", bad.Index))
			if i := s.fsm.appliedIndex(); i != good.Index {
				t.Errorf("applied up to %d, want %d", i, good.Index)
			}
		})
	}
}

func TestGapInTheLogRefusesToOpen(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir, inBbolt)
	gap := mustApply(t, s, register("gap"))
	mustApply(t, s, register("after"))
	mustClose(t, s)
	editLog(t, dir, func(db logStore) {
		if err := db.DeleteRange(gap.Index, gap.Index); err != nil {
			t.Fatal(err)
		}
	})
	if s, err := Open(testConfig(t, dir)); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("log entry %d is damaged: it is missing", gap.Index)) {
		t.Errorf("open gave %v, %v", s, err)
	}
}
