package raftstore

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/cluster"
)

// childVariable makes the test binary the writer process that the tests kill.
const childVariable = "RAFTSTORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		if err := writer(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if list := os.Getenv(restoreVariable); list != "" {
		if err := restorer(list); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// Raft leaves questions open that a broken disk has cut off.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/rxvision/rxvision/raftstore.(*Store).settle.func1"))
}

// patience bounds waits that end soon unless something is broken.
const patience = 60 * time.Second

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("never happened: %s", what)
		}
	}
}

// testConfig is a store on a free port that logs to the test.
func testConfig(tb testing.TB, dir string) Config {
	return Config{
		Dir: dir, Bind: "127.0.0.1:0", Name: "test", Version: "0.0.0", BootstrapExpect: 1, segment: 1 << 20,
		Logger: slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})),
	}
}

// mustOpen opens a store and waits until it leads. Its state is checked, and it
// is closed, at the end.
func mustOpen(tb testing.TB, dir string, change ...func(*Config)) *Store {
	tb.Helper()
	cfg := testConfig(tb, dir)
	for _, f := range change {
		f(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { mustClose(tb, s) })
	eventually(tb, "this server leads", s.IsLeader)
	eventually(tb, "the server and its cluster are known", func() bool {
		snap := s.State().Snapshot()
		self := snap.Server(nil, s.ID())
		return snap.ClusterMeta(nil) != nil && self != nil && self.RaftAddr == s.Addr()
	})
	return s
}

func mustClose(tb testing.TB, s *Store) {
	tb.Helper()
	failed := s.Err() != nil
	if err := s.State().Snapshot().Check(); err != nil {
		tb.Errorf("state at close: %v", err)
	}
	if err := s.Close(); err != nil && !failed {
		tb.Errorf("close: %v", err)
	}
}

func testJob(id string) *cluster.Job {
	return &cluster.Job{
		Region: "global", Namespace: cluster.DefaultNamespace, ID: id, Name: id, Type: cluster.JobTypeService,
		Priority: cluster.DefaultPriority, Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool,
		TaskGroups: []*cluster.TaskGroup{{
			Name: "web", Count: 1,
			Tasks: []*cluster.Task{{
				Name: "x", Driver: "raw_exec", Config: json.RawMessage(`{"command":"/bin/sleep"}`),
				Env:       map[string]string{"A": "1", "B": "2"},
				Resources: &cluster.Resources{CPU: 100, MemoryMB: 64},
			}},
		}},
	}
}

func register(id string) *cluster.RegisterJob {
	return &cluster.RegisterJob{Job: testJob(id), EvalID: newUUID(), Submission: &cluster.JobSubmission{Source: "job " + id, Format: "hcl2"}}
}

func mustApply(tb testing.TB, s *Store, c cluster.Command) cluster.Result {
	tb.Helper()
	res, err := s.Apply(context.Background(), c)
	if err != nil {
		tb.Fatalf("%T: %v", c, err)
	}
	return res
}

// fill writes something into most tables.
func fill(tb testing.TB, s *Store, jobs int) {
	tb.Helper()
	node := &cluster.Node{
		ID: newUUID(), Name: "n1", Datacenter: "dc1", NodePool: cluster.DefaultNodePool, Status: cluster.NodeStatusReady,
		SchedulingEligibility: cluster.NodeEligible,
		NodeResources: &cluster.NodeResources{
			Cpu: cluster.NodeCPU{CpuShares: 4000}, Memory: cluster.NodeMemory{MemoryMB: 8192},
			Disk: cluster.NodeDisk{DiskMB: 10000}, MinDynamicPort: 20000, MaxDynamicPort: 32000,
		},
	}
	mustApply(tb, s, &cluster.RegisterNode{Node: node})
	mustApply(tb, s, &cluster.CreateModelVersion{Version: &cluster.ModelVersion{Model: "fashion", Digest: "sha256:" + strings.Repeat("ab", 32), Size: 7, Platform: "onnxruntime_onnx"}})
	mustApply(tb, s, &cluster.SetAlias{Model: "fashion", Alias: "production", Version: 1})
	for i := range jobs {
		id := fmt.Sprintf("job-%d", i)
		res := mustApply(tb, s, register(id))
		alloc := &cluster.Allocation{
			ID: newUUID(), Namespace: cluster.DefaultNamespace, EvalID: res.EvalID, Name: id + ".web[0]", NodeID: node.ID, NodeName: "n1",
			JobID: id, JobVersion: res.Version, TaskGroup: "web", DesiredStatus: cluster.AllocDesiredRun, ClientStatus: cluster.AllocClientPending,
			AllocatedResources: &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{
				"x": {Cpu: cluster.AllocatedCPU{CpuShares: 100}, Memory: cluster.AllocatedMemory{MemoryMB: 64}},
			}},
		}
		eval := cluster.Clone(s.State().Snapshot().Eval(nil, res.EvalID))
		plan := &cluster.Plan{
			EvalID: eval.ID, EvalEpoch: eval.ModifyIndex, Namespace: eval.Namespace, JobID: id, JobVersion: res.Version,
			JobModifyIndex: res.JobModifyIndex, Place: []*cluster.Allocation{alloc}, Evals: []*cluster.Evaluation{eval},
		}
		eval.Status = cluster.EvalStatusComplete
		if got := mustApply(tb, s, &cluster.ApplyPlans{Plans: []*cluster.Plan{plan}}); len(got.Plans) != 1 || got.Plans[0].Stale || len(got.Plans[0].Refused) > 0 {
			tb.Fatalf("plan of %s: %+v", id, got.Plans)
		}
	}
}

// dump is every record of the state, by table and key, but what it knows of
// servers: that changes with each start, and no restore brings it.
func dump(tb testing.TB, s *Store) map[string]string {
	tb.Helper()
	return dumpState(tb, s.State())
}

// dumpState leaves out what a state knows of servers: that changes with each
// start, and no restore brings it.
func dumpState(tb testing.TB, state *cluster.State) map[string]string {
	tb.Helper()
	out := dumpAll(tb, state)
	maps.DeleteFunc(out, func(key, _ string) bool {
		return strings.Contains(key, cluster.TableServers) || strings.Contains(key, cluster.TableClusterMeta)
	})
	return out
}

func dumpAll(tb testing.TB, state *cluster.State) map[string]string {
	tb.Helper()
	out := map[string]string{}
	err := state.Snapshot().Records(func(t *cluster.Table, key string, record any) error {
		out[t.Name+"/"+key] = string(cluster.Marshal(record))
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// mustEqual compares dumps.
func mustEqual(tb testing.TB, what string, got, want map[string]string) {
	tb.Helper()
	for k, v := range want {
		if got[k] != v {
			tb.Errorf("%s: %s is %q, want %q", what, k, got[k], v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			tb.Errorf("%s: %s is new", what, k)
		}
	}
}

// writer registers jobs as fast as it can until it is killed, and prints each
// one's ID and index once it is acknowledged.
func writer(dir string) error {
	s, err := Open(Config{
		Dir: dir, Bind: "127.0.0.1:0", BootstrapExpect: 1, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		// So that kills hit snapshots and log truncation too.
		Tuning: Tuning{LeaderWait: patience, SnapshotThreshold: 64, SnapshotInterval: 20 * time.Millisecond, TrailingLogs: 32},
	})
	if err != nil {
		return err
	}
	fmt.Println("open")
	acks := make(chan string)
	for range 4 {
		go func() {
			for {
				id := fmt.Sprintf("kill-%016x", rand.Uint64())
				res, err := s.Apply(context.Background(), register(id))
				if err != nil {
					acks <- "error " + err.Error()
					return
				}
				acks <- fmt.Sprintf("%s %d", id, res.Index)
			}
		}()
	}
	out := bufio.NewWriter(os.Stdout)
	for line := range acks {
		fmt.Fprintln(out, line)
		if err := out.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// newestSnapshot is the file of the newest snapshot in a data folder.
func newestSnapshot(tb testing.TB, dir string) string {
	tb.Helper()
	snaps, err := openSnapshots(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	list, err := snaps.List()
	if err != nil || len(list) == 0 {
		tb.Fatalf("no snapshot in %s: %v", dir, err)
	}
	return filepath.Join(dir, snapFolder, list[0].ID, snapFile)
}
