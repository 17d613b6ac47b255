package gateway

import (
	"context"
	"iter"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

const (
	lookEvery   = 200 * time.Millisecond // at the requests in flight
	reportEvery = 2 * time.Second        // to the servers, of the average
	reportLimit = 5 * time.Second
	maxReported = 20_000 // measurements in one report
)

// load counts, by model, the requests that wait for a replica.
type load struct {
	mu    sync.Mutex
	held  map[string]int
	woken chan struct{} // capacity 1: something waits that did not before
}

func newLoad() *load { return &load{held: map[string]int{}, woken: make(chan struct{}, 1)} }

// hold counts a request in; the function returned counts it out.
func (l *load) hold(model string) func() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[model]++; l.held[model] == 1 {
		select {
		case l.woken <- struct{}{}:
		default:
		}
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.held[model]--; l.held[model] == 0 {
			delete(l.held, model)
		}
	}
}

// queue adds up how long a replica lets requests wait for their turn.
type queue struct {
	micros, answers atomic.Int64
	untimed         atomic.Bool // it does not say
}

// add takes what an answer says in its header.
func (q *queue) add(header string) {
	us, err := strconv.ParseInt(header, 10, 64)
	if err != nil || us < 0 {
		q.untimed.Store(true)
		return
	}
	q.micros.Add(us)
	q.answers.Add(1)
}

// mean is the mean since it was last asked, in milliseconds. Who answers nothing and works on nothing lets nobody wait; of who
// works on something and has answered nothing it is not known.
func (q *queue) mean(inFlight int64) (ms float64, known bool) {
	us, n := q.micros.Swap(0), q.answers.Swap(0)
	switch {
	case q.untimed.Load():
		return 0, false
	case n > 0:
		return float64(us) / float64(n) / 1000, true
	}
	return 0, inFlight == 0
}

// report tells the servers what is in flight at each replica, how long requests wait there, and how many are held for each model, until
// ctx ends. By that groups are scaled; a report that is lost is lost.
func (g *Gateway) report(ctx context.Context) {
	client := pb.NewFleetClient(g.cfg.Servers)
	look, send := time.NewTicker(lookEvery), time.NewTicker(reportEvery)
	defer look.Stop()
	defer send.Stop()
	sums, looks := map[string]int64{}, 0
	tell := func(samples []*pb.Sample) {
		for part := range slices.Chunk(samples, maxReported) {
			soon, cancel := context.WithTimeout(ctx, reportLimit)
			if _, err := client.Report(soon, &pb.Samples{Source: g.cfg.Name, Samples: part}); err != nil && ctx.Err() == nil {
				g.log.Debug("the servers did not take a report", "error", err)
			}
			cancel()
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			looks++
			for e := range g.replicas() {
				sums[e.alloc] += e.inFlight.Load()
			}
		case <-g.load.woken: // who waits is told of at once
			tell(g.waiting(false))
		case <-send.C:
			samples := g.waiting(true)
			for alloc, sum := range sums { // none without a look
				samples = append(samples, &pb.Sample{Of: alloc, Metric: cluster.MetricInFlight, Value: float64(sum) / float64(looks)})
			}
			for e := range g.replicas() {
				if ms, known := e.queue.mean(e.inFlight.Load()); known {
					samples = append(samples, &pb.Sample{Of: e.alloc, Metric: cluster.MetricQueueTime, Value: ms})
				}
			}
			tell(samples)
			clear(sums)
			looks = 0
		}
	}
}

// replicas are those that are ready.
func (g *Gateway) replicas() iter.Seq[*endpoint] {
	return func(yield func(*endpoint) bool) {
		for _, m := range g.router.current.Load().models {
			for _, v := range m.versions {
				for _, e := range v.ready {
					if !yield(e) {
						return
					}
				}
			}
		}
	}
}

// waiting tells how many requests wait for a replica of each model; all: also of those that are served, or would be if
// somebody asked, while none waits, which is something else than that no gateway tells.
func (g *Gateway) waiting(all bool) (samples []*pb.Sample) {
	g.load.mu.Lock()
	defer g.load.mu.Unlock()
	for name, m := range g.router.current.Load().models {
		n := g.load.held[name]
		if n > 0 || all && slices.ContainsFunc(m.versions, func(v *version) bool { return v.wakes || v.starting > 0 || len(v.ready) > 0 }) {
			samples = append(samples, &pb.Sample{Of: name, Metric: cluster.MetricHeld, Value: float64(n)})
		}
	}
	return samples
}
