package serve

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/rxvision/rxvision/oip"
)

// executor runs requests on the model, when their turn comes. HTTP knows only this.
type executor interface {
	// infer runs the model as ort.Session.Run does, and says how long the request waited and ran.
	infer(ctx context.Context, inputs []oip.Tensor, outputs []string) (result []oip.Tensor, t timings, err error)
}

var (
	errQueueFull = oip.Errorf(http.StatusTooManyRequests, "the queue of this worker is full: try again later")
	errNoMemory  = oip.Errorf(http.StatusTooManyRequests,
		"the requests that this worker holds are too large to take another one: try again later")
)

// runner is what runs a model: an ort.Session, or a stand-in in tests.
type runner interface {
	Run(ctx context.Context, inputs []oip.Tensor, outputs []string) ([]oip.Tensor, error)
	Close()
}

// gate is the plain executor: each request is one run, a bounded number of them at once, and a bounded number waits.
type gate struct {
	runner   runner
	slots    chan struct{} // one element for each run
	waiting  atomic.Int64
	maxQueue int64
	metrics  *metrics
}

func newGate(r runner, concurrent, queue int, m *metrics) *gate {
	return &gate{runner: r, slots: make(chan struct{}, concurrent), maxQueue: int64(queue), metrics: m}
}

func (g *gate) infer(ctx context.Context, inputs []oip.Tensor, outputs []string) (result []oip.Tensor, t timings, err error) {
	start := time.Now()
	if err := g.enter(ctx); err != nil {
		return nil, t, err
	}
	defer func() { <-g.slots }()
	begin := time.Now()
	t.queue = begin.Sub(start)
	result, err = g.runner.Run(ctx, inputs, outputs)
	t.compute = time.Since(begin)
	if err == nil {
		g.metrics.executions.Inc()
	}
	return result, t, err
}

// enter waits for a slot; requests that wait get theirs in the order in which they came.
func (g *gate) enter(ctx context.Context) error {
	select {
	case g.slots <- struct{}{}:
		return nil
	default:
	}
	defer g.waiting.Add(-1)
	if g.waiting.Add(1) > g.maxQueue {
		return errQueueFull
	}
	g.metrics.pending.Inc()
	defer g.metrics.pending.Dec()
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// budget bounds the bytes of all request bodies that are held at once.
type budget struct {
	used  atomic.Int64
	limit int64
}

// take reserves n bytes; release gives them back.
func (b *budget) take(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *budget) release(n int64) { b.used.Add(-n) }
