package fleet

import (
	"context"
	"log/slog"
	"sync"
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

	minRetry = 100 * time.Millisecond // between attempts while the log takes nothing
	maxRetry = 2 * time.Second
)

type report struct {
	ctx    context.Context // of the session
	allocs []*cluster.Allocation
	done   func(error)
}

// batcher puts reports of many sessions into few log entries. Its queue is bounded
// by what each session may have under way.
type batcher struct {
	store   Store
	log     *slog.Logger
	batches prometheus.Histogram

	mu     sync.Mutex
	queue  []report
	allocs int           // in queue
	wake   chan struct{} // capacity 1: the queue is not empty
	full   chan struct{} // capacity 1: the queue makes a batch
}

func newBatcher(store Store, log *slog.Logger) *batcher {
	return &batcher{
		store: store, log: log, wake: make(chan struct{}, 1), full: make(chan struct{}, 1),
		batches: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "rxvision_fleet_status_batch_allocations", Help: "Allocations per committed batch of status.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 10),
		}),
	}
}

// add queues a report; done is called once with the outcome. It never waits: the
// caller also has heartbeats to read.
func (b *batcher) add(r report) {
	b.mu.Lock()
	b.queue = append(b.queue, r)
	b.allocs += len(r.allocs)
	full := b.allocs >= batchSize
	b.mu.Unlock()
	ring(b.wake)
	if full {
		ring(b.full)
	}
}

func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}

// take gives the oldest reports: about a batch.
func (b *batcher) take() []report {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, allocs := 0, 0
	for n < len(b.queue) && allocs < batchSize {
		allocs += len(b.queue[n].allocs)
		n++
	}
	batch := b.queue[:n:n]
	b.queue = b.queue[n:]
	b.allocs -= allocs
	if len(b.queue) > 0 {
		ring(b.wake)
	} else {
		b.queue = nil
	}
	if b.allocs >= batchSize {
		ring(b.full)
	}
	return batch
}

func (b *batcher) run(ctx context.Context) {
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		select {
		case <-b.full:
		case <-time.After(batchAge):
		case <-ctx.Done():
			return
		}
		b.commit(ctx, b.take())
	}
}

// commit stores reports, trying until the log takes them or refuses them for good.
// Sessions stay meanwhile: to end them would only have every node come again at once.
func (b *batcher) commit(ctx context.Context, reports []report) {
	var err error
	for pause := minRetry; ; pause = min(2*pause, maxRetry) {
		err = b.try(ctx, reports)
		if c := cluster.CodeOf(err); c != cluster.CodeNoLeader && c != cluster.CodeUnavailable {
			break
		}
		b.log.Warn("status of allocations waits: the log takes nothing", "error", err, "retry_in", pause)
		select {
		case <-time.After(pause):
			continue
		case <-ctx.Done():
		}
		break
	}
	for _, r := range reports {
		r.done(err)
	}
}

// try stores reports once, in as many entries as their size asks for. They share
// an entry, so they share the outcome.
func (b *batcher) try(ctx context.Context, reports []report) (err error) {
	snap := b.store.State().Snapshot()
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
		if r.ctx.Err() != nil {
			continue // the node reports again on its next stream, and newer things then
		}
		for _, a := range r.allocs {
			n := snap.EntrySize(a)
			if size+n > batchBytes {
				flush()
			}
			cmd.Allocs, size = append(cmd.Allocs, a), size+n
		}
	}
	flush()
	return err
}
