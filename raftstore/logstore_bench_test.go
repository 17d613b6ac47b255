package raftstore

import (
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// sampleAlloc is an allocation with what real ones carry: resources, the metrics
// of its placement, a task's state with its events.
func sampleAlloc(i int) *cluster.Allocation {
	a := &cluster.Allocation{
		ID: newUUID(), Namespace: cluster.DefaultNamespace, EvalID: newUUID(), Name: fmt.Sprintf("job-%d.web[0]", i), NodeID: newUUID(),
		NodeName: "node-17", JobID: fmt.Sprintf("job-%d", i), TaskGroup: "web", DesiredStatus: cluster.AllocDesiredRun,
		ClientStatus: cluster.AllocClientRunning,
		AllocatedResources: &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{
			"x": {Cpu: cluster.AllocatedCPU{CpuShares: 100}, Memory: cluster.AllocatedMemory{MemoryMB: 64}},
		}},
		Metrics: &cluster.AllocMetric{
			NodesEvaluated: 100, NodesInPool: 100, NodePool: cluster.DefaultNodePool, NodesAvailable: map[string]int{"dc1": 100},
			AllocationTime: time.Millisecond,
		},
		TaskStates: map[string]*cluster.TaskState{"x": {State: "running"}},
	}
	for range 3 {
		a.Metrics.ScoreMetaData = append(a.Metrics.ScoreMetaData, &cluster.NodeScore{NodeID: newUUID(), Scores: map[string]int64{"binpack": 700}, Norm: 700})
		a.TaskStates["x"].Events = append(a.TaskStates["x"].Events, &cluster.TaskEvent{Type: "Started", Time: 1e18 + int64(i), DisplayMessage: "Task started by client"})
	}
	return a
}

// sampleEntries are log entries as a busy region has them: half registrations,
// a quarter plans with four placements, a quarter status updates of eight.
func sampleEntries() [][]byte {
	var out [][]byte
	for i := range 256 {
		var c cluster.Command = register(fmt.Sprintf("job-%d", i))
		switch i % 4 {
		case 2:
			plans := &cluster.ApplyPlans{}
			for j := range 4 {
				a := sampleAlloc(i*8 + j)
				a.TaskStates = nil
				plans.Plans = append(plans.Plans, &cluster.Plan{EvalID: a.EvalID, Namespace: a.Namespace, JobID: a.JobID, Place: []*cluster.Allocation{a}})
			}
			c = plans
		case 3:
			update := &cluster.UpdateAllocs{}
			for j := range 8 {
				a := sampleAlloc(j)
				update.Allocs = append(update.Allocs, &cluster.Allocation{ID: a.ID, ClientStatus: a.ClientStatus, TaskStates: a.TaskStates})
			}
			c = update
		}
		stamp := cluster.StampOf(c)
		stamp.RequestID, stamp.Time = newUUID(), 1e18
		out = append(out, seal(cluster.EncodeCommand(c)))
	}
	return out
}

// BenchmarkLogStore compares the stores of the log: batches of entries appended
// and synced, the beginning deleted as after snapshots, with and without another
// goroutine that writes and syncs 16 MB files as snapshots do.
func BenchmarkLogStore(b *testing.B) {
	entries := sampleEntries()
	for _, kind := range []string{LogBbolt, LogWAL} {
		for _, batch := range []int{1, 8, 64} {
			for _, snapshots := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/batch=%d/snapshots=%v", kind, batch, snapshots), func(b *testing.B) {
					benchmarkLog(b, kind, batch, snapshots, entries)
				})
			}
		}
	}
}

func benchmarkLog(b *testing.B, kind string, batch int, snapshots bool, entries [][]byte) {
	dir := b.TempDir()
	if err := createStable(dir, nil); err != nil {
		b.Fatal(err)
	}
	st, err := openStable(dir, false)
	if err != nil {
		b.Fatal(err)
	}
	defer st.close()
	log, err := openLog(kind, dir, st, walSegment, slog.New(slog.DiscardHandler), false)
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	if snapshots {
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
					if err := writeProbe(b.TempDir(), 16<<20); err != nil {
						b.Error(err)
					}
				}
			}
		}()
		defer func() { close(stop); <-done }()
	}
	next, first, size := uint64(1), uint64(1), 0
	b.ResetTimer()
	for b.Loop() {
		logs := make([]*raft.Log, batch)
		for i := range logs {
			e := entries[next%uint64(len(entries))]
			logs[i] = &raft.Log{Index: next, Term: 3, Data: e, AppendedAt: time.Unix(1e9, 0)}
			size += len(e)
			next++
		}
		if err := log.StoreLogs(logs); err != nil {
			b.Fatal(err)
		}
		if next-first > 8192+2048 {
			if err := log.DeleteRange(first, next-2048); err != nil {
				b.Fatal(err)
			}
			first = next - 2047
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "entries/s")
	b.ReportMetric(float64(size)/float64(next-1), "B/entry")
	b.ReportMetric(float64(folderSize(b, dir))/1e6, "MB-on-disk")
}

func folderSize(tb testing.TB, dir string) (n int64) {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := os.Stat(path)
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return n
}
