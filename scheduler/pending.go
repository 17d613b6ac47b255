package scheduler

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// pendingEvery is between two looks at what waits, which cost one at all open evaluations.
const pendingEvery = 5 * time.Second

// Names of resources in the metric of what waits, besides those of devices.
const (
	pendingAllocs = "allocations"
	pendingCPU    = "cpu"
	pendingMemory = "memory"
)

// pendingKey is one resource in one node pool.
type pendingKey struct{ pool, resource string }

// pendingOf adds up what the allocations ask for that wait for room: by it groups of nodes can grow, from none too.
// What a quota keeps back is left out: no node would help it.
func pendingOf(snap *cluster.Snapshot) map[pendingKey]int64 {
	sum := map[pendingKey]int64{}
	for _, e := range snap.OpenEvals(nil) {
		if e.Status != cluster.EvalStatusBlocked || e.QuotaLimitReached != "" {
			continue
		}
		j := snap.Job(nil, e.JobKey())
		if j == nil || j.Stop {
			continue
		}
		for name, n := range e.QueuedAllocations {
			g := j.Group(name)
			if g == nil || n == 0 {
				continue
			}
			add := func(resource string, each int64) {
				if each > 0 {
					sum[pendingKey{j.NodePool, resource}] += each * int64(n)
				}
			}
			add(pendingAllocs, 1)
			for _, t := range g.Tasks {
				if t.Resources == nil {
					continue
				}
				add(pendingCPU, int64(t.Resources.CPU))
				add(pendingMemory, int64(t.Resources.MemoryMB))
				for _, d := range t.Resources.Devices {
					device, milli, mib := d.Share()
					if milli == 0 && mib == 0 {
						milli = int64(d.Count) * cluster.WholeMilli
					}
					add(device, milli)
				}
			}
		}
	}
	return sum
}

// watchPending keeps the metric of what waits as new as pendingEvery.
func (s *Scheduler) watchPending(ctx context.Context) error {
	return s.watchState(ctx, pendingEvery, func(snap *cluster.Snapshot, ws cluster.WatchSet) cluster.Time {
		snap.Index(ws, cluster.TableEvals)
		s.metrics.pending.Reset()
		for k, n := range pendingOf(snap) {
			s.metrics.pending.WithLabelValues(k.pool, k.resource).Set(float64(n))
		}
		return 0
	})
}
