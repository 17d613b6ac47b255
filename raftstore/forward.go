package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Apply writes a command to the log and gives what applying it returned. On a
// server that is not the leader it has the leader do that, and returns once this
// server has applied it too. It stamps RequestID and Time when they are empty.
// The error is Result.Err when the rules refused the command, ErrNoLeader when
// nobody could take it within the leader wait, CodeTooLarge when it is over
// MaxEntry, CodeUnsupported while a server of the region is too old to know it,
// CodeUnavailable when the disk is full, the leader does not answer or the store has
// ended, and ctx's when that ended first.
func (s *Store) Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error) {
	end, err := s.begin()
	if err != nil {
		return cluster.Result{}, err
	}
	defer end()
	stamp := cluster.StampOf(cmd)
	setDefault(&stamp.RequestID, newUUID())
	setDefault(&stamp.Time, time.Now().UnixNano())
	snap := s.State().Snapshot()
	if err := snap.Supports(cmd); err != nil {
		return cluster.Result{}, err
	}
	entry := seal(snap.EncodeCommand(cmd))
	if len(entry) > MaxEntry {
		return cluster.Result{}, cluster.Errorf(cluster.CodeTooLarge,
			"the change takes %d bytes, over the limit of %d bytes for one change", len(entry), MaxEntry)
	}
	start := time.Now()
	res, err := s.applyEntry(ctx, entry)
	if err == nil && res.Err != nil {
		err = res.Err
	}
	s.metrics.applied(start, err)
	return res, err
}

// note applies a command of the servers' own. Repeating it does no harm, so that
// it needs no request ID, and no room among the results that are kept.
func (s *Store) note(ctx context.Context, cmd cluster.Command) error {
	cluster.StampOf(cmd).Time = time.Now().UnixNano()
	res, err := s.applyEntry(ctx, seal(s.State().Snapshot().EncodeCommand(cmd)))
	if err == nil && res.Err != nil {
		err = res.Err
	}
	return err
}

// applyEntry proposes an entry until it is answered. Trying again is safe: the
// request ID inside makes it apply once.
func (s *Store) applyEntry(ctx context.Context, entry []byte) (cluster.Result, error) {
	weight := weightOf(entry)
	if err := s.weight.Acquire(ctx, weight); err != nil {
		return cluster.Result{}, fmt.Errorf("wait for earlier writes: %w", err)
	}
	release := func() { s.weight.Release(weight) }
	forwarded := false
	res, err := byLeader(ctx, s, func() (cluster.Result, error) {
		forwarded = false
		out, later, err := s.proposeFor(ctx, entry)
		if later != nil {
			wait := release
			release = func() { s.ops.Go(func() { <-later; wait() }) }
		}
		if err != nil {
			return cluster.Result{}, err
		}
		return out[0].Result, out[0].err
	}, func(ctx context.Context, leader string, c pb.PeersClient) (cluster.Result, error) {
		forwarded = true
		return s.carry(ctx, leader, c, entry)
	})
	release()
	if err != nil || !forwarded {
		return res, err
	}
	return res, s.catchUpTo(ctx, res.Index)
}

// weightOf is what entries count of maxInFlight.
func weightOf(entries ...[]byte) (weight int64) {
	for _, e := range entries {
		weight += int64(max(len(e), minWeight))
	}
	return min(weight, maxInFlight)
}

// applyHere proposes entries that another server has forwarded.
func (s *Store) applyHere(ctx context.Context, entries [][]byte) ([]outcome, error) {
	weight := weightOf(entries...)
	if err := s.weight.Acquire(ctx, weight); err != nil {
		return nil, err
	}
	out, later, err := s.proposeFor(ctx, entries...)
	if later != nil {
		s.ops.Go(func() { <-later; s.weight.Release(weight) })
	} else {
		s.weight.Release(weight)
	}
	return out, err
}

// proposal is entries on their way into the log.
type proposal struct {
	entries [][]byte
	answer  chan []outcome // takes one without blocking
}

// proposals go to raft a round at a time: what comes while rounds are under way
// waits and shares the next one, with its syncs and messages.
type proposals struct {
	mu      sync.Mutex
	waiting []*proposal
	rounds  int
}

// proposeFor proposes entries for a caller who may give up; then later tells when
// raft has let go of them.
func (s *Store) proposeFor(ctx context.Context, entries ...[]byte) (_ []outcome, later <-chan []outcome, _ error) {
	p := &proposal{entries: entries, answer: make(chan []outcome, 1)}
	s.proposals.mu.Lock()
	s.proposals.waiting = append(s.proposals.waiting, p)
	begin := s.proposals.rounds < maxRounds
	if begin {
		s.proposals.rounds++
	}
	s.proposals.mu.Unlock()
	if begin {
		s.ops.Go(func() {
			for round := s.proposals.next(); round != nil; round = s.proposals.next() {
				s.propose(round)
			}
		})
	}
	select {
	case out := <-p.answer:
		return out, nil, nil
	case <-ctx.Done():
		return nil, p.answer, fmt.Errorf("wait for the write to be stored (it may still be): %w", ctx.Err())
	}
}

// next gives all that waits; nil ends a round's turn.
func (p *proposals) next() []*proposal {
	p.mu.Lock()
	defer p.mu.Unlock()
	round := p.waiting
	p.waiting = nil
	if round == nil {
		p.rounds--
	}
	return round
}

// give answers a proposal that has no answer yet.
func (p *proposal) give(out []outcome) {
	select {
	case p.answer <- out:
	default:
	}
}

// propose hands proposals to raft, waits until they are applied here and answers them.
func (s *Store) propose(round []*proposal) {
	err := s.settle(func() error {
		s.proposeNow(round)
		return nil
	})
	if err == nil {
		return
	}
	for _, p := range round {
		out := make([]outcome, len(p.entries))
		for i := range out {
			out[i].err = err
		}
		p.give(out)
	}
}

func (s *Store) proposeNow(round []*proposal) {
	var futures []raft.ApplyFuture
	s.fsm.news.tell() // before raft hears of it: a message that waits is out of the way then
	for _, p := range round {
		for _, entry := range p.entries {
			futures = append(futures, s.raft.Apply(entry, enqueueTimeout))
		}
	}
	for _, p := range round {
		out := make([]outcome, len(p.entries))
		for i := range out {
			out[i] = s.outcomeOf(futures[0])
			futures = futures[1:]
		}
		p.give(out)
	}
}

func (s *Store) outcomeOf(future raft.ApplyFuture) outcome {
	err := future.Error()
	switch fatal := s.Err(); {
	case err == nil:
		return future.Response().(outcome)
	case fatal != nil:
		err = fatal
	case errors.Is(err, raft.ErrRaftShutdown):
		err = errClosing
	case lostLeader(err):
		err = cluster.ErrNoLeader
	}
	return outcome{err: err}
}

// lostLeader says whether raft's error means that this server was not, or did
// not stay, the leader for the entry.
func lostLeader(err error) bool {
	for _, e := range []error{
		raft.ErrNotLeader, raft.ErrLeadershipLost, raft.ErrLeadershipTransferInProgress,
		raft.ErrAbortedByRestore, raft.ErrEnqueueTimeout,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// catchUpTo waits, for LeaderWait at most, until this server has applied what the
// leader has.
func (s *Store) catchUpTo(ctx context.Context, index uint64) error {
	wait, cancel := context.WithTimeout(ctx, s.cfg.LeaderWait)
	defer cancel()
	err := s.fsm.wait(wait, index, s.failed, s.closing)
	switch {
	case err == nil:
		return nil
	case s.Err() != nil:
		return s.Err()
	case ctx.Err() != nil:
		return fmt.Errorf("wait for index %d, which the leader has: %w", index, ctx.Err())
	case wait.Err() != nil:
		return cluster.Errorf(cluster.CodeUnavailable, "this server lags behind: the leader has index %d, it has %d", index, s.fsm.appliedIndex())
	}
	return err
}

// ReadIndex returns once this server has applied everything that was committed
// when the call began, so that a read of State afterwards misses nothing. The
// leader says what that is: with verify after a quorum has confirmed that it still
// leads (such reads are linearizable), otherwise by its lease. Errors are those
// of Apply.
func (s *Store) ReadIndex(ctx context.Context, verify bool) error {
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	index, err := byLeader(ctx, s,
		func() (uint64, error) { return s.readIndexHere(ctx, verify) },
		func(ctx context.Context, leader string, c pb.PeersClient) (uint64, error) {
			reply, err := c.ReadIndex(ctx, &pb.ReadIndexRequest{Verify: verify})
			if err == nil {
				s.hear(leader, reply.Commit)
			}
			return reply.GetIndex(), err
		})
	if err != nil {
		return err
	}
	return s.catchUpTo(ctx, index)
}

// readIndexHere is the leader's part: the index of the last command at or before
// what is committed now. Applying it here first makes sure that nobody shows more
// than is told.
func (s *Store) readIndexHere(ctx context.Context, verify bool) (uint64, error) {
	term, committed := s.raft.CurrentTerm(), s.raft.CommitIndex()
	if verify {
		confirmed, err := s.confirms.wait(ctx, s.ops.Go, s.confirm)
		if err != nil {
			return 0, err
		}
		if confirmed != term {
			return 0, cluster.ErrNoLeader
		}
	}
	if !s.IsLeader() || s.raft.CurrentTerm() != term {
		return 0, cluster.ErrNoLeader
	}
	wait, cancel := context.WithTimeout(ctx, s.cfg.LeaderWait)
	defer cancel()
	if err := s.fsm.waitSeen(wait, committed, s.failed, s.closing); err != nil {
		return 0, cmpErr(s.Err(), err)
	}
	return s.fsm.appliedIndex(), nil
}

// confirm asks the voters for their terms and gives this server's own when a
// majority is in it: then no other leader was elected before this began. 0 when
// too few are. (Raft's own VerifyLeader also counts answers to heartbeats from
// before, which a process that was stopped for a while finds in its sockets.)
func (s *Store) confirm() uint64 {
	ctx, cancel := context.WithTimeout(s.ending, s.cfg.LeaderLease)
	defer cancel()
	term, servers := s.raft.CurrentTerm(), s.configuration().Servers
	answers := make(chan bool, len(servers))
	voters, asked, agree := 0, 0, 0
	for _, m := range servers {
		if m.Suffrage != raft.Voter {
			continue
		}
		if voters++; m.ID == s.id {
			agree++
			continue
		}
		asked++
		s.ops.Go(func() {
			client, err := s.clients.at(s.addrOf(string(m.ID)), string(m.ID))
			if err != nil {
				answers <- false
				return
			}
			reply, err := client.Term(ctx, &pb.Nothing{}, grpc.WaitForReady(true))
			answers <- err == nil && reply.Term == term
		})
	}
	for ; asked > 0 && agree <= voters/2; asked-- {
		if <-answers {
			agree++
		}
	}
	if agree <= voters/2 {
		return 0
	}
	return term
}

// rounds lets any number of callers share a question: each gets the answer of a
// round that began after it asked.
type rounds struct {
	mu            sync.Mutex
	current, next *round
}

type round struct {
	done   chan struct{}
	answer uint64
}

// wait gives the answer of ask, which start runs beside the caller.
func (r *rounds) wait(ctx context.Context, start func(func()), ask func() uint64) (uint64, error) {
	r.mu.Lock()
	if r.next == nil {
		r.next = &round{done: make(chan struct{})}
	}
	mine := r.next
	if r.current == nil {
		r.current, r.next = r.next, nil
		start(func() { r.run(ask) })
	}
	r.mu.Unlock()
	select {
	case <-mine.done:
		return mine.answer, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (r *rounds) run(ask func() uint64) {
	for now := r.current; now != nil; {
		now.answer = ask()
		close(now.done)
		r.mu.Lock()
		r.current, r.next = r.next, nil
		now = r.current
		r.mu.Unlock()
	}
}

// barrier waits until all entries up to now are applied here, and notes how far
// that is: the entries that raft writes for itself never reach the FSM.
func (s *Store) barrier() error {
	var future raft.Future
	err := s.settle(func() error {
		future = s.raft.Barrier(enqueueTimeout)
		return future.Error()
	})
	if err != nil {
		return err
	}
	if f, ok := future.(raft.IndexFuture); ok {
		s.fsm.sawBarrier(f.Index())
	}
	return nil
}

// forwardRestore brings an archive to the leader.
func (s *Store) forwardRestore(ctx context.Context, r io.Reader) (*Info, error) {
	wait, cancel := context.WithTimeout(ctx, s.cfg.LeaderWait)
	defer cancel()
	leader, _, err := s.waitLeader(wait)
	if err != nil {
		return nil, err
	}
	if leader == string(s.id) {
		return s.restoreHere(ctx, r)
	}
	client, err := s.clients.at(s.addrOf(leader), leader)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx) // also ends the stream
	defer stop()
	stream, err := client.Restore(ctx)
	if err != nil {
		return nil, restoreError(err)
	}
	buf := make([]byte, restoreChunk)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 && stream.Send(&pb.Chunk{Data: buf[:n]}) != nil {
			break // the leader's reason comes with the reply
		}
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read snapshot archive: %w", err)
		}
	}
	restored, err := stream.CloseAndRecv()
	if err != nil {
		return nil, restoreError(err)
	}
	info := new(Info)
	if err := cluster.Unmarshal(restored.Info, info); err != nil {
		return nil, err
	}
	// It is restored. This server takes a large one over later than the leader did.
	for {
		err := s.ReadIndex(ctx, false)
		if cluster.CodeOf(err) != cluster.CodeUnavailable || s.Err() != nil {
			return info, err
		}
		select {
		case <-time.After(s.cfg.MeetInterval):
		case <-s.closing:
			return info, err
		case <-ctx.Done():
			return info, err
		}
	}
}

func restoreError(err error) error {
	if err = fromStatus(err); unreachable(err) {
		return cluster.Errorf(cluster.CodeUnavailable, "restore snapshot: the leader cannot be reached; it may or may not have restored it: %v", err)
	}
	return err
}

// Restore implements pb.PeersServer.
func (s *service) Restore(stream grpc.ClientStreamingServer[pb.Chunk, pb.Restored]) error {
	info, err := onlyLeader(s.Store, func() (*Info, error) { return s.restoreHere(stream.Context(), &chunkReader{stream: stream}) })
	if err != nil {
		return err
	}
	return stream.SendAndClose(&pb.Restored{Info: cluster.Marshal(info)})
}

// chunkReader is a stream as a reader.
type chunkReader struct {
	stream grpc.ClientStreamingServer[pb.Chunk, pb.Restored]
	rest   []byte
}

// Read implements io.Reader.
func (c *chunkReader) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		chunk, err := c.stream.Recv()
		if err != nil {
			return 0, err
		}
		c.rest = chunk.Data
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}
