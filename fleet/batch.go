package fleet

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

// Status of many nodes goes into the log in batches: a batch is closed by age or
// by size, whichever comes first.
const (
	batchAge   = 20 * time.Millisecond
	batchSize  = 512       // allocations
	batchBytes = 768 << 10 // of an entry; the log takes 1 MiB
	batchQueue = 1024
)

type report struct {
	allocs []*cluster.Allocation
	done   func(error)
}

// batcher puts reports of many sessions into few log entries.
type batcher struct {
	store   Store
	in      chan report
	batches prometheus.Histogram
}

func newBatcher(store Store) *batcher {
	return &batcher{store: store, in: make(chan report, batchQueue), batches: prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "rxvision_fleet_status_batch_allocations", Help: "Allocations per committed batch of status.",
		Buckets: prometheus.ExponentialBuckets(1, 2, 10),
	})}
}

// add queues a report; done is called once with the outcome. It waits while the
// queue is full.
func (b *batcher) add(ctx context.Context, allocs []*cluster.Allocation, done func(error)) error {
	select {
	case b.in <- report{allocs, done}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *batcher) run(ctx context.Context) {
	for {
		var reports []report
		select {
		case r := <-b.in:
			reports = append(reports, r)
		case <-ctx.Done():
			return
		}
		n := len(reports[0].allocs)
		closed := time.NewTimer(batchAge)
	gather:
		for n < batchSize {
			select {
			case r := <-b.in:
				reports = append(reports, r)
				n += len(r.allocs)
			case <-closed.C:
				break gather
			case <-ctx.Done():
				break gather
			}
		}
		closed.Stop()
		b.commit(ctx, reports)
	}
}

// commit stores reports, in as many entries as their size asks for. They share
// an entry, so they share the outcome.
func (b *batcher) commit(ctx context.Context, reports []report) {
	var err error
	cmd, size := &cluster.UpdateAllocs{}, 0
	flush := func() {
		if err != nil || len(cmd.Allocs) == 0 {
			return
		}
		if _, err = b.store.Apply(ctx, cmd); err == nil {
			b.batches.Observe(float64(len(cmd.Allocs)))
		}
		cmd, size = &cluster.UpdateAllocs{}, 0
	}
	for _, r := range reports {
		for _, a := range r.allocs {
			n := len(cluster.Marshal(a))
			if size+n > batchBytes {
				flush()
			}
			cmd.Allocs, size = append(cmd.Allocs, a), size+n
		}
	}
	flush()
	for _, r := range reports {
		r.done(err)
	}
}
