package api

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of blocking queries.
const (
	// MaxWait is the longest and the default wait of a blocking query.
	MaxWait = 300 * time.Second
	// jitterPart of the wait is added at random, so that clients do not come back at once.
	jitterPart = 16
	// MaxBlocking bounds the blocking queries under way on one server.
	MaxBlocking = 10_000
)

// request is one request with what its route and query say.
type request struct {
	*http.Request
	http   http.ResponseWriter
	params map[string]string // of the route's pattern
	query  url.Values

	namespace string
	stale     bool
	verified  bool // ?consistent: the leader asks the quorum whether it still leads
	index     uint64
	wait      time.Duration
	prefix    string
	filter    string
	perPage   int
	nextToken string
	reverse   bool

	waited bool // it was a blocking query that waited

	access  access   // what the route needs
	caller  identity // who asks
	decided bool     // allowIn was called
}

// parse reads the options that all routes share.
func (r *request) parse(region string) (err error) {
	r.query = r.URL.Query()
	q := r.query
	if v := q.Get("region"); v != "" && v != region {
		return errRegion
	}
	r.namespace = q.Get("namespace")
	if r.namespace == "" {
		r.namespace = cluster.DefaultNamespace
	}
	if r.stale, err = r.flag("stale", true); err != nil {
		return err
	}
	if r.verified, err = r.flag("consistent", true); err != nil {
		return err
	}
	if r.stale && r.verified {
		return badRequest("stale and consistent exclude each other")
	}
	if r.reverse, err = r.flag("reverse", true); err != nil {
		return err
	}
	if v := q.Get("index"); v != "" {
		if r.index, err = strconv.ParseUint(v, 10, 64); err != nil {
			return badRequest("Invalid index")
		}
	}
	r.wait = MaxWait
	if v := q.Get("wait"); v != "" {
		wait, err := time.ParseDuration(v)
		if err != nil {
			return badRequest("Invalid wait time")
		}
		if wait > 0 {
			r.wait = min(wait, MaxWait)
		}
	}
	if v := q.Get("per_page"); v != "" {
		n, err := strconv.ParseInt(v, 10, 32)
		if err != nil || n < 0 {
			return badRequest("Expect a number for `per_page` query string parameter")
		}
		r.perPage = int(n)
	}
	r.prefix, r.filter, r.nextToken = q.Get("prefix"), q.Get("filter"), q.Get("next_token")
	return nil
}

// flag reads a boolean parameter; bare is what it means when it is there without
// a value.
func (r *request) flag(name string, bare bool) (bool, error) {
	values, ok := r.query[name]
	if !ok {
		return false, nil
	}
	if values[0] == "" {
		return bare, nil
	}
	v, err := strconv.ParseBool(values[0])
	if err != nil {
		return false, badRequest("Expect `true` or `false` for `%s` query string parameter", name)
	}
	return v, nil
}

// number reads a whole number; def when it is not there.
func (r *request) number(name string, def int64) (int64, error) {
	v := r.query.Get(name)
	if v == "" {
		return def, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return 0, badRequest("Expect a number for `%s` query string parameter", name)
	}
	return n, nil
}

// jobKey is the job that the route names.
func (r *request) jobKey() cluster.JobKey {
	return cluster.JobKey{Namespace: r.namespace, ID: r.params["job"]}
}

// found is what a read gives: the body, or nil and the error that says that it is
// not there, and the index of what it depends on.
type found struct {
	body  any
	index uint64
	next  string
	err   error
}

// read answers a query from the state, waiting for a change when the client asks
// for it. fn adds what it depends on to ws and may run several times.
func (s *Server) read(r *request, fn func(snap *cluster.Snapshot, ws cluster.WatchSet) found) (any, error) {
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	f, err := s.block(r, fn)
	if err != nil {
		return nil, err
	}
	return &answer{body: f.body, index: f.index, next: f.next, err: f.err, read: true}, nil
}

func (s *Server) block(r *request, fn func(snap *cluster.Snapshot, ws cluster.WatchSet) found) (found, error) {
	if r.index == 0 {
		return fn(s.cfg.Store.State().Snapshot(), nil), nil
	}
	var ctx context.Context
	for {
		snap, ws := s.cfg.Store.State().Snapshot(), make(cluster.WatchSet)
		ws.Add(snap.Abandoned())
		f := fn(snap, ws)
		if f.index > r.index || cluster.CodeOf(f.err) == cluster.CodeInvalid {
			return f, nil
		}
		if ctx == nil {
			select {
			case s.blocked <- struct{}{}:
				defer func() { <-s.blocked }()
			default:
				return found{}, errBlocking
			}
			s.metrics.blocking.Inc()
			defer s.metrics.blocking.Dec()
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(r.Context(), r.wait+rand.N(r.wait/jitterPart+1))
			defer cancel()
			r.waited = true
		}
		switch err := ws.WatchCtx(ctx); {
		case r.Context().Err() != nil:
			return found{}, r.Context().Err()
		case err != nil: // the wait is over
			return f, nil
		}
		select {
		case <-snap.Abandoned(): // another state took its place, whatever its indexes
			return fn(s.cfg.Store.State().Snapshot(), nil), nil
		default:
		}
	}
}

// fresh waits until this server's state holds all that was committed when the
// request came, as the leader knows it; stale reads do not ask for that.
func (s *Server) fresh(r *request) error {
	if r.stale {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.LeaderWait)
	defer cancel()
	err := s.cfg.Store.ReadIndex(ctx, r.verified)
	switch {
	case err == nil:
		return nil
	case r.Context().Err() != nil:
		return r.Context().Err()
	case ctx.Err() != nil: // the wait is over, not the client's patience
		return s.cfg.Store.NoLeader()
	}
	return err
}

// hasLeader says whether some server leads; this one only with all entries applied.
func (s *Server) hasLeader() bool {
	if s.cfg.Store.IsLeader() {
		return true
	}
	leader, _ := s.cfg.Store.Leader()
	return leader != "" && leader != s.cfg.ID
}

// missing is the answer to a lookup that found nothing: the table's index and the
// sentence that says so.
func missing(snap *cluster.Snapshot, ws cluster.WatchSet, table, text string) found {
	return found{index: snap.Index(ws, table), err: notFound("%s", text)}
}

const uuidLen = 36

// wholeUUID checks an ID that must be whole; what names its kind as Nomad does.
func wholeUUID(id, what string) (string, error) {
	if len(id) != uuidLen {
		return "", refusedf("%s lookup failed: index error: UUID must be 36 characters", what)
	}
	full, err := uuidPrefix(id, what)
	if err != nil || len(full) != uuidLen {
		return "", refusedf("%s lookup failed: index error: Invalid UUID %q", what, id)
	}
	return full, nil
}

// uuidPrefix brings a prefix of an ID, with hyphens or without, to the form that
// IDs have. Like Nomad it wants whole bytes.
func uuidPrefix(prefix, what string) (string, error) {
	digits := strings.ToLower(strings.ReplaceAll(prefix, "-", ""))
	if len(digits)%2 != 0 {
		return "", refusedf("%s lookup failed: index error: Input (without hyphens) must be even length", what)
	}
	for _, c := range digits {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return "", refusedf("%s lookup failed: index error: Invalid UUID: encoding/hex: invalid byte: %#U", what, c)
		}
	}
	return hyphenate(digits), nil
}

func hyphenate(digits string) string {
	var b strings.Builder
	for i, c := range digits {
		if i == 8 || i == 12 || i == 16 || i == 20 {
			b.WriteByte('-')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// errOf gives an error's Nomad text for a kind: `failed to lookup eval: …`.
func errOf(what string, err error) error {
	var s *statusError
	if errors.As(err, &s) {
		return &statusError{s.status, fmt.Errorf("failed to lookup %s: %w", what, s.err)}
	}
	return err
}
