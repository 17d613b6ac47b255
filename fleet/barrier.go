package fleet

import (
	"context"
	"sync"

	"github.com/rxvision/rxvision/cluster"
)

// barrier shares one reading of the leader's index among all who ask before it
// begins: a thousand nodes that attach at once cost a few.
type barrier struct {
	read func(context.Context) error
	ctx  context.Context
	stop context.CancelFunc
	turn chan struct{} // capacity 1: held by who reads
	wg   sync.WaitGroup

	mu     sync.Mutex
	next   *round // nobody reads for it yet
	closed bool
}

type round struct {
	done chan struct{}
	err  error
}

func newBarrier(read func(context.Context) error) *barrier {
	b := &barrier{read: read, turn: make(chan struct{}, 1)}
	b.ctx, b.stop = context.WithCancel(context.Background())
	return b
}

// wait returns once a reading that began after the call has ended.
func (b *barrier) wait(ctx context.Context) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return cluster.Errorf(cluster.CodeUnavailable, "this server is ending")
	}
	r := b.next
	if r == nil {
		r = &round{done: make(chan struct{})}
		b.next = r
		b.wg.Go(func() { b.run(r) })
	}
	b.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *barrier) run(r *round) {
	b.turn <- struct{}{}
	b.mu.Lock()
	b.next = nil // who comes from here on may have heard of something newer
	b.mu.Unlock()
	r.err = b.read(b.ctx)
	<-b.turn
	close(r.done)
}

// close ends what is under way and waits for it.
func (b *barrier) close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.stop()
	b.wg.Wait()
}
