package raftstore

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// bigState has so many jobs with ten running allocations each.
func bigState(tb testing.TB, jobs int) *cluster.State {
	tb.Helper()
	state, index := cluster.NewState(), uint64(0)
	apply := func(c cluster.Command) cluster.Result {
		tb.Helper()
		index++
		stamp := cluster.StampOf(c)
		stamp.RequestID, stamp.Time = newUUID(), int64(1e18)+int64(index)
		res, err := state.Apply(index, cluster.EncodeCommand(c))
		if err != nil || res.Err != nil {
			tb.Fatal(err, res.Err)
		}
		return res
	}
	var nodes []string
	for i := range 2000 {
		n := &cluster.Node{
			ID: newUUID(), Name: fmt.Sprintf("n%d", i), Datacenter: "dc1", NodePool: cluster.DefaultNodePool, Status: cluster.NodeStatusReady,
			SchedulingEligibility: cluster.NodeEligible,
			NodeResources: &cluster.NodeResources{
				Cpu: cluster.NodeCPU{CpuShares: 1 << 30}, Memory: cluster.NodeMemory{MemoryMB: 1 << 30},
				Disk: cluster.NodeDisk{DiskMB: 1 << 30}, MinDynamicPort: 20000, MaxDynamicPort: 32000,
			},
		}
		apply(&cluster.RegisterNode{Node: n})
		nodes = append(nodes, n.ID)
	}
	for i := range jobs {
		c := register(fmt.Sprintf("job-%d", i))
		c.Job.TaskGroups[0].Count = 10
		res := apply(c)
		eval := cluster.Clone(state.Snapshot().Eval(nil, res.EvalID))
		plan := &cluster.Plan{
			EvalID: eval.ID, EvalEpoch: eval.ModifyIndex, Namespace: eval.Namespace, JobID: eval.JobID, JobVersion: res.Version,
			JobModifyIndex: res.JobModifyIndex, Evals: []*cluster.Evaluation{eval},
		}
		eval.Status = cluster.EvalStatusComplete
		update := &cluster.UpdateAllocs{}
		for j := range 10 {
			a := sampleAlloc(i)
			a.EvalID, a.JobID, a.NodeID, a.Name = eval.ID, eval.JobID, nodes[(i*10+j)%len(nodes)], fmt.Sprintf("%s.web[%d]", eval.JobID, j)
			states := a.TaskStates
			a.ClientStatus, a.TaskStates = cluster.AllocClientPending, nil
			plan.Place = append(plan.Place, a)
			update.Allocs = append(update.Allocs, &cluster.Allocation{ID: a.ID, ClientStatus: cluster.AllocClientRunning, TaskStates: states})
		}
		if got := apply(&cluster.ApplyPlans{Plans: []*cluster.Plan{plan}}).Plans[0]; got.Stale || len(got.Refused) > 0 {
			tb.Fatalf("plan: %+v", got)
		}
		apply(update)
	}
	return state
}

// BenchmarkBigState times the parts of saving and restoring with 100,000
// allocations, or RXVISION_BENCH_ALLOCS.
func BenchmarkBigState(b *testing.B) {
	allocs := 100_000
	if v := os.Getenv("RXVISION_BENCH_ALLOCS"); v != "" {
		var err error
		if allocs, err = strconv.Atoi(v); err != nil {
			b.Fatal(err)
		}
	}
	state := bigState(b, allocs/10)
	snap := state.Snapshot()
	path := filepath.Join(b.TempDir(), "state")
	b.Run("write snapshot", func(b *testing.B) {
		for b.Loop() {
			if err := os.RemoveAll(path); err != nil {
				b.Fatal(err)
			}
			if err := writeSnapshot(path, snap, snapshotHead{Index: 1}, nil, nil); err != nil {
				b.Fatal(err)
			}
		}
		stat, err := os.Stat(path)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(stat.Size())/1e6, "MB")
	})
	b.Run("read snapshot", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := readSnapshot(path); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("hash file", func(b *testing.B) {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		for b.Loop() {
			if _, err := hashFile(f); err != nil {
				b.Fatal(err)
			}
		}
	})
	var archive bytes.Buffer
	b.Run("write archive", func(b *testing.B) {
		for b.Loop() {
			archive.Reset()
			a, err := writeArchive(&paced{ctx: context.Background()}, b.TempDir(), snap, "bench", raft.SnapshotMeta{Index: 1})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := archive.ReadFrom(a); err != nil {
				b.Fatal(err)
			}
			if err := a.Close(); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(archive.Len())/1e6, "MB")
	})
	b.Run("read archive", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := readArchive(context.Background(), bytes.NewReader(archive.Bytes()), 0, nil, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("restore archive into a store", func(b *testing.B) {
		s := mustOpen(b, b.TempDir(), quiet)
		b.ResetTimer()
		for range b.N {
			if _, err := s.RestoreArchive(context.Background(), bytes.NewReader(archive.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		begin := time.Now()
		if err := s.Snapshot(); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(begin).Seconds(), "next-snapshot-s")
	})
}

// BenchmarkWriteBesideSnapshot is the latency of registrations while nothing else
// happens, and while snapshots or archives of 50,000 allocations are written all the time.
func BenchmarkWriteBesideSnapshot(b *testing.B) {
	var archive bytes.Buffer
	a, err := writeArchive(&paced{ctx: context.Background()}, b.TempDir(), bigState(b, 5000).Snapshot(), "bench", raft.SnapshotMeta{Index: 1, Term: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer a.Close()
	if _, err := archive.ReadFrom(a); err != nil {
		b.Fatal(err)
	}
	for _, beside := range []string{"nothing", "snapshots", "archives"} {
		b.Run(beside, func(b *testing.B) {
			s := mustOpen(b, b.TempDir(), quiet)
			if _, err := s.RestoreArchive(context.Background(), bytes.NewReader(archive.Bytes())); err != nil {
				b.Fatal(err)
			}
			stop, done := make(chan struct{}), make(chan int)
			go func() {
				n := 0
				for ; beside != "nothing"; n++ {
					select {
					case <-stop:
						done <- n
						return
					default:
					}
					if beside == "snapshots" {
						if err := s.Snapshot(); err != nil {
							b.Error(err)
						}
					} else if a, err := s.SaveArchive(context.Background()); err != nil {
						b.Error(err)
					} else if err := a.Close(); err != nil {
						b.Error(err)
					}
				}
				done <- n
			}()
			took := make([]time.Duration, 0, b.N)
			b.ResetTimer()
			for i := range b.N {
				begin := time.Now()
				if _, err := s.Apply(context.Background(), register(fmt.Sprintf("beside-%d", i))); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
			}
			b.StopTimer()
			close(stop)
			b.ReportMetric(float64(<-done), "written")
			slices.Sort(took)
			b.ReportMetric(took[len(took)/2].Seconds()*1e3, "p50-ms")
			b.ReportMetric(took[len(took)*99/100].Seconds()*1e3, "p99-ms")
		})
	}
}
