package sim

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// What a proposal may come to, beside the rules' answer.
var (
	errLeadershipLost = errors.New("leadership was lost while the entry was under way")
	errNoLeader       = errors.New("no leader is known here")
	errDiskFull       = errors.New("the leader's disk is full")
	errGivenUp        = errors.New("no answer")
)

// Patience of whoever sends a request.
const (
	answerWait = 800 * time.Millisecond // before it is sent again
	retryPause = 150 * time.Millisecond // after an error
)

// request is a command on its way. Its ID, time and bytes are set when the first
// server takes it, and stay however often it is sent.
type request struct {
	w     *world
	cmd   cluster.Command
	id    string
	entry []byte // nil until the first server has stamped it

	from    address
	to      func() *server // the server to try next
	tries   int            // left
	serial  int            // of the try under way
	floor   uint64         // newest index that anybody was told of before
	settled bool
	facts   []*fact // what it gave; more than one only after a restore
	done    func(cluster.Result, error)
}

// propose sends a command until it is answered, at most tries times, each time to
// the server that to gives. done is called once, on the sender's side.
func (w *world) propose(from address, cmd cluster.Command, tries int, to func() *server, done func(cluster.Result, error)) {
	r := &request{w: w, cmd: cmd, id: w.newID(), from: from, to: to, tries: tries, floor: w.truth.told, done: done}
	r.try()
}

// anyServer draws a server for each try.
func (w *world) anyServer() *server { return pick(w, w.servers) }

func (r *request) try() {
	if r.settled {
		return
	}
	if r.tries--; r.tries < 0 {
		r.settle(cluster.Result{}, errGivenUp)
		return
	}
	r.serial++
	serial, s := r.serial, r.to()
	if s == nil {
		r.settle(cluster.Result{}, errGivenUp)
		return
	}
	if serial > 1 {
		r.w.coverage.fault("request retried")
	}
	answered := func(res cluster.Result, err error) { r.answered(serial, res, err) }
	if r.from == s.addr { // the server itself
		s.receive(r, answered)
	} else {
		r.w.net.send(r.from, s.addr, s.alive(func() {
			s.receive(r, func(res cluster.Result, err error) {
				r.w.net.send(s.addr, r.from, func() { answered(res, err) })
			})
		}))
	}
	r.w.after(answerWait+r.w.upTo(answerWait), func() {
		if r.serial == serial {
			r.try()
		}
	})
}

// answered takes an answer, which may be to an earlier try.
func (r *request) answered(serial int, res cluster.Result, err error) {
	switch {
	case r.settled:
	case err == nil:
		r.w.truth.acknowledged(r, res)
		r.settle(res, nil)
	case serial == r.serial:
		r.serial++ // the timer of this try is void
		r.w.after(r.w.upTo(retryPause), r.try)
	}
}

func (r *request) settle(res cluster.Result, err error) {
	r.settled = true
	if r.done != nil {
		r.done(res, err)
	}
}

// receive takes a request: the leader appends it, a follower passes it on to
// whom it believes to lead, now and then twice.
func (s *server) receive(r *request, reply func(cluster.Result, error)) {
	if r.entry == nil {
		*cluster.StampOf(r.cmd) = cluster.Stamp{RequestID: r.id, Time: int64(s.clock())}
		r.entry = cluster.EncodeCommand(r.cmd)
	}
	switch {
	case s.role == leader && s.full:
		reply(cluster.Result{}, errDiskFull)
	case s.role == leader:
		s.append(&entry{req: r})
		s.waiting[s.last()] = waiter{s.term, reply}
	case s.leader < 0 || s.leader == s.id:
		reply(cluster.Result{}, errNoLeader)
	default:
		s.forward(r, s.w.servers[s.leader], reply)
		if s.w.chance(20) {
			s.w.coverage.fault("request forwarded twice")
			s.forward(r, s.w.servers[s.leader], reply)
		}
	}
}

func (s *server) forward(r *request, to *server, reply func(cluster.Result, error)) {
	s.w.net.send(s.addr, to.addr, to.alive(func() {
		if to.role != leader {
			s.w.net.send(to.addr, s.addr, s.alive(func() { reply(cluster.Result{}, errNoLeader) }))
			return
		}
		to.receive(r, func(res cluster.Result, err error) {
			s.w.net.send(to.addr, s.addr, s.alive(func() { reply(res, err) }))
		})
	}))
}

// kindName is a command's name as people say it.
func kindName(c cluster.Command) string { return strings.TrimPrefix(fmt.Sprintf("%T", c), "*cluster.") }
