package raftstore

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// AppendEntriesPipeline implements raft.Transport.
func (g *gate) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	inner, err := g.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	p := &pipeline{AppendPipeline: inner, news: g.news, out: make(chan raft.AppendFuture), done: make(chan struct{})}
	go p.run()
	return p, nil
}

// pipeline takes every answer off raft's own pipeline at once. Raft stops reading
// answers after one that is not a success, and may send another request before it
// notices; its own pipeline would hold that one up for ever, and with it the
// replication to that server, and raft's end.
type pipeline struct {
	raft.AppendPipeline
	news *news
	told told // of raft's one goroutine that sends
	out  chan raft.AppendFuture
	done chan struct{}
	once sync.Once
}

// idlePause is how long a message waits that tells nothing new.
const idlePause = 50 * time.Millisecond

// told is what a message to a follower said last, and the news that there were then.
type told struct {
	term, prev, commit, news uint64
}

// AppendEntries implements raft.AppendPipeline. Raft sends a message each commitTimeout, so that followers soon know what is
// committed, whether there is anything to tell or not: at 5 ms that is a tenth of a core with nothing going on. One that
// tells nothing new waits for news here.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	now := told{term: args.Term, prev: args.PrevLogEntry, commit: args.LeaderCommitIndex, news: p.told.news}
	if len(args.Entries) == 0 && now == p.told {
		p.news.wait(p.told.news, idlePause, p.done)
	}
	now.news = p.news.count()
	p.told = now
	return p.AppendPipeline.AppendEntries(args, resp)
}

// news counts what followers may have to hear of: proposals, and what was applied.
type news struct {
	mu   sync.Mutex
	n    uint64
	more chan struct{} // closed with the next; nil: nobody waits
}

func (n *news) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.n++
	if n.more != nil {
		close(n.more)
		n.more = nil
	}
}

func (n *news) count() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.n
}

// wait waits for more news than seen, for a while, or until done.
func (n *news) wait(seen uint64, most time.Duration, done <-chan struct{}) {
	n.mu.Lock()
	if n.n != seen {
		n.mu.Unlock()
		return
	}
	if n.more == nil {
		n.more = make(chan struct{})
	}
	more := n.more
	n.mu.Unlock()
	late := time.NewTimer(most)
	defer late.Stop()
	select {
	case <-more:
	case <-late.C:
	case <-done:
	}
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.out }

// run keeps as many answers as there are requests under way, which raft's
// pipeline bounds.
func (p *pipeline) run() {
	var waiting []raft.AppendFuture
	for {
		var out chan<- raft.AppendFuture
		var first raft.AppendFuture
		if len(waiting) > 0 {
			out, first = p.out, waiting[0]
		}
		select {
		case f := <-p.AppendPipeline.Consumer():
			waiting = append(waiting, f)
		case out <- first:
			waiting = waiting[1:]
		case <-p.done:
			return
		}
	}
}

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() { close(p.done) })
	return p.AppendPipeline.Close()
}
