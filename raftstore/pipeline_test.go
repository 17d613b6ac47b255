package raftstore

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// sentPipeline notes when messages were sent.
type sentPipeline struct {
	raft.AppendPipeline
	at []time.Duration
	t0 time.Time
}

func (s *sentPipeline) AppendEntries(*raft.AppendEntriesRequest, *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	s.at = append(s.at, time.Since(s.t0))
	return nil, nil
}

// TestIdleMessagesWait sends what raft sends each few milliseconds: only what tells nothing new waits, and no longer than
// until there is news.
func TestIdleMessagesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n news
		sent := &sentPipeline{t0: time.Now()}
		p := &pipeline{AppendPipeline: sent, news: &n, done: make(chan struct{})}
		entries := []*raft.Log{{Index: 8}}
		step := func(want time.Duration, args raft.AppendEntriesRequest) {
			t.Helper()
			began := time.Now()
			if _, err := p.AppendEntries(&args, nil); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took != want {
				t.Errorf("sent after %s, want %s", took, want)
			}
		}
		idle := raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 7, LeaderCommitIndex: 7}
		step(0, idle) // the first
		step(idlePause, idle)
		step(idlePause, idle)
		n.tell() // a proposal that raft has not heard of yet
		step(0, idle)
		step(idlePause, idle)
		step(0, raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 7, LeaderCommitIndex: 7, Entries: entries})
		step(0, raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 8, LeaderCommitIndex: 7}) // what it has sent is new
		step(0, raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 8, LeaderCommitIndex: 8}) // committed
		idle.PrevLogEntry, idle.LeaderCommitIndex = 8, 8
		time.AfterFunc(idlePause/5, n.tell) // news wake one that waits
		step(idlePause/5, idle)
		step(idlePause, idle)
		time.AfterFunc(idlePause/5, func() { close(p.done) })
		step(idlePause/5, idle) // and so does the end
		if len(sent.at) != 11 {
			t.Errorf("%d of 11 messages were sent", len(sent.at))
		}
	})
}
