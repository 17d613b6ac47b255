// Package scheduler is the leader's loop: it answers evaluations by plans,
// watches over deployments and drains, launches periodic jobs, and forgets what has ended. Where work
// goes is decided by package place; what is committed, by the rules of cluster.
// Here are only order, retries and time. DESIGN.md tells why it is built so.
package scheduler

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// Store is what the scheduler needs of the replicated store.
type Store interface {
	// Apply commits a command; the error is the rules' refusal, or says why the
	// command could not be committed.
	Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error)
	// State is the current state of this server.
	State() *cluster.State
	// SnapshotMinIndex gives a view no older than index.
	SnapshotMinIndex(ctx context.Context, index uint64) (*cluster.Snapshot, error)
	// LeaderCh tells whether this server leads: the current answer at once, then
	// each change; true after true means that leadership was lost in between. It
	// is closed when ctx or the store ends.
	LeaderCh(ctx context.Context) <-chan bool
}

// Config is what New needs. Store and Logger are required.
type Config struct {
	Store      Store
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil: no metrics
	Workers    int                   // plans made side by side; 0: one for each processor, at most 4
	Metrics    Metrics               // by which groups are scaled; nil: none are
	Retention  Retention
}

// Scheduler runs on every server and works on the one that leads.
type Scheduler struct {
	store   Store
	log     *slog.Logger
	workers int
	keep    Retention
	metrics *metrics
	mix     atomic.Pointer[place.Mix]
	queue   atomic.Pointer[queue] // nil while this server does not schedule

	scalings atomic.Pointer[map[string]*cluster.ScalingStatus] // by policy ID, of the last look; nil: this server does not lead
	measured Metrics
}

// New makes a scheduler; Run starts it.
func New(cfg Config) (*Scheduler, error) {
	if cfg.Store == nil || cfg.Logger == nil {
		return nil, errors.New("scheduler: Store and Logger must be set")
	}
	s := &Scheduler{store: cfg.Store, log: cfg.Logger, workers: cfg.Workers, keep: cfg.Retention, metrics: newMetrics(), measured: cfg.Metrics}
	if s.workers <= 0 {
		s.workers = min(runtime.GOMAXPROCS(0), 4)
	}
	s.keep.defaults()
	if err := s.metrics.register(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("scheduler metrics: %w", err)
	}
	return s, nil
}

// Run follows the store's leadership until ctx ends, and schedules while this
// server leads. It returns when everything it started has ended; nil when ctx or
// the store has.
func (s *Scheduler) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := func() {}
	defer func() { stop() }()
	for leader := range s.store.LeaderCh(ctx) {
		stop()
		stop = func() {}
		if leader {
			stop = s.start(ctx)
		}
	}
	return nil
}

// start begins a reign; the function it gives ends it and waits.
func (s *Scheduler) start(ctx context.Context) func() {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.reign(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

// reignPause is between a failure of scheduling and its new begin.
const reignPause = time.Second

// reign schedules until ctx ends. All it knows it takes from the state, so a new
// leader begins where the old one stopped, and so does this one after a failure.
func (s *Scheduler) reign(ctx context.Context) {
	s.log.Info("scheduling begins", "workers", s.workers)
	defer s.log.Info("scheduling ends")
	for {
		err := s.schedule(ctx)
		if ctx.Err() != nil {
			return
		}
		s.log.Error("scheduling failed; it begins anew", "error", err)
		select {
		case <-time.After(reignPause):
		case <-ctx.Done():
			return
		}
	}
}

// schedule runs all parts of the loop until ctx ends or one of them fails.
func (s *Scheduler) schedule(ctx context.Context) error {
	q := newQueue()
	s.queue.Store(q)
	defer s.queue.Store(nil)
	defer s.metrics.idle()
	a := newApplier(s)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(ctx, q) })
	g.Go(func() error { return a.run(ctx) })
	for range s.workers {
		w := &worker{Scheduler: s, queue: q, applier: a}
		g.Go(func() error { return w.run(ctx) })
	}
	g.Go(func() error { return s.watchMix(ctx) })
	g.Go(func() error { return s.watchPending(ctx) })
	g.Go(func() error { return s.autoscale(ctx) })
	g.Go(func() error { return s.watchDeployments(ctx) })
	g.Go(func() error { return s.watchDrains(ctx) })
	g.Go(func() error { return s.watchPeriodic(ctx) })
	g.Go(func() error { return s.collect(ctx) })
	return g.Wait()
}

// watchState calls look on a snapshot, and again whenever something that look
// read through its watch set has changed, another state has taken this one's
// place, or the time that look gave (0: none) has come. A look that took long is
// followed by a pause, so that a state that changes all the time costs no more than
// a part of a core; rest is the shortest pause. It ends with ctx.
func (s *Scheduler) watchState(ctx context.Context, rest time.Duration, look func(*cluster.Snapshot, cluster.WatchSet) (next cluster.Time)) error {
	for {
		snap := s.store.State().Snapshot()
		ws := make(cluster.WatchSet)
		start := time.Now()
		next := look(snap, ws)
		took := time.Since(start)
		ws.Add(snap.Abandoned())
		if err := waitChange(ctx, ws, next); err != nil {
			return err
		}
		if took > quickLook {
			pause := max(rest, min(lookShare*took, maxLookPause))
			if err := sleep(ctx, pause); err != nil {
				return err
			}
		}
	}
}

// Pauses between looks at a state that changes all the time.
const (
	quickLook    = 50 * time.Microsecond // needs none
	lookShare    = 29                    // times what the look took
	maxLookPause = 250 * time.Millisecond
)

// waitChange returns when a watch fires or the time comes; with ctx's error when that ends.
func waitChange(ctx context.Context, ws cluster.WatchSet, at cluster.Time) error {
	timed, cancel := ctx, context.CancelFunc(func() {})
	if at != 0 {
		timed, cancel = context.WithDeadline(ctx, at.Std())
	}
	defer cancel()
	_ = ws.WatchCtx(timed) // fired, or timed has ended
	return ctx.Err()
}

// apply commits a command, trying again while the store cannot take it. The
// error is the rules' refusal, or ctx's.
func (s *Scheduler) apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error) {
	for delay := minBackoff; ; delay = min(2*delay, maxBackoff) {
		res, err := s.store.Apply(ctx, cmd)
		if err == nil || res.Err != nil || ctx.Err() != nil || !temporary(err) {
			return res, err
		}
		s.log.Warn("a change could not be stored; trying again", "command", fmt.Sprintf("%T", cmd), "in", delay, "error", err)
		if err := sleep(ctx, delay); err != nil {
			return res, err
		}
	}
}

// Backoff while the store takes nothing: no leader, a full disk.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// temporary says whether trying again can help.
func temporary(err error) bool {
	switch cluster.CodeOf(err) {
	case cluster.CodeNoLeader, cluster.CodeUnavailable, cluster.CodeInternal:
		return true
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func now() cluster.Time { return cluster.TimeOf(time.Now()) }

// newID makes a random (version 4) UUID.
func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, by its documentation
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
