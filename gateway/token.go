package gateway

import (
	"container/list"
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/oip"
)

// Life and bounds of what a TokenCache remembers.
const (
	// TokenFresh is how long an answer about a token is good: so long a deleted
	// token, or a changed policy, may go on here.
	TokenFresh = 30 * time.Second
	// TokenStale is how long a known token goes on while no server answers.
	TokenStale = time.Hour
	// MaxTokens bounds the tokens that are remembered.
	MaxTokens = 10_000

	unknownFresh  = 2 * time.Second // a token that is made now shall soon be good
	maxUnknown    = 1_000           // apart, so that guesses cannot push known ones out
	askTimeout    = 2 * time.Second
	askPause      = 5 * time.Second // between two attempts for a token while no server answers
	maxAsking     = 64              // questions to servers at once
	maxAskWaiting = time.Second     // for a place among them
)

// Authorizer decides who may use models.
type Authorizer interface {
	// Authorize says whether the holder of a secret, "" for none, has one of the
	// capabilities for a model. The error has status 403 when not, and 503 when that
	// cannot be found out now.
	Authorize(ctx context.Context, secret, model string, anyOf ...acl.Capability) error
}

// Holder is who has a token.
type Holder struct {
	Accessor string // "" for who has none
	ACL      *acl.ACL
	Expires  time.Time // zero: never
}

// Tokens asks a server for the holder of a token by its secret's hash
// (acl.HashSecret; "" for no token). It gives nil when there is no such token.
type Tokens interface {
	Resolve(ctx context.Context, hash string) (*Holder, error)
}

// FleetTokens is Tokens over the fleet's wire.
func FleetTokens(servers grpc.ClientConnInterface) Tokens { return fleetTokens{servers} }

type fleetTokens struct{ servers grpc.ClientConnInterface }

func (f fleetTokens) Resolve(ctx context.Context, hash string) (*Holder, error) {
	reply, err := pb.NewFleetClient(f.servers).ResolveToken(ctx, &pb.ResolveTokenRequest{SecretHash: hash})
	if err != nil || !reply.Found {
		return nil, err
	}
	h := &Holder{Accessor: reply.Accessor, ACL: acl.All}
	if reply.Expires != 0 {
		h.Expires = time.Unix(0, reply.Expires)
	}
	if reply.Management {
		return h, nil
	}
	var policies []*acl.Policy
	for _, rules := range reply.Rules {
		p, err := acl.Parse(rules)
		if err != nil {
			return nil, fmt.Errorf("a policy of token %s cannot be read by this version of rxvision: %w", reply.Accessor, err)
		}
		policies = append(policies, p)
	}
	h.ACL = acl.Compile(policies...)
	return h, nil
}

// TokenCache is the Authorizer of a region with access control. It remembers what
// servers say of tokens, by hash: for TokenFresh, and while no server answers for
// TokenStale. What it does not know then is refused with 503.
type TokenCache struct {
	tokens Tokens
	asking chan struct{}
	flight singleflight.Group
	asked  *prometheus.CounterVec

	mu      sync.Mutex
	known   recent
	unknown recent
}

// NewTokenCache makes a TokenCache.
func NewTokenCache(tokens Tokens, reg prometheus.Registerer) *TokenCache {
	c := &TokenCache{
		tokens: tokens, asking: make(chan struct{}, maxAsking), known: newRecent(MaxTokens), unknown: newRecent(maxUnknown),
		asked: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rxvision_gateway_token_lookups_total", Help: "Tokens asked of servers, by what came of it: known, unknown, stale (no answer, the last one counts on) or failed.",
		}, []string{"result"}),
	}
	reg.MustRegister(c.asked)
	return c
}

// Authorize implements Authorizer.
func (c *TokenCache) Authorize(ctx context.Context, secret, model string, anyOf ...acl.Capability) error {
	hash := ""
	if secret != "" {
		hash = acl.HashSecret(secret)
	}
	h, err := c.holder(ctx, hash)
	switch {
	case err != nil:
		return err
	case h == nil || !h.Expires.IsZero() && !time.Now().Before(h.Expires):
		return oip.Errorf(http.StatusForbidden, "ACL token not found")
	case !slices.ContainsFunc(anyOf, func(want acl.Capability) bool { return h.ACL.Allow(want, "", model) }):
		return oip.Errorf(http.StatusForbidden, "Permission denied")
	}
	return nil
}

// holder gives who has a token, nil for nobody.
func (c *TokenCache) holder(ctx context.Context, hash string) (*Holder, error) {
	now := time.Now()
	c.mu.Lock()
	e := c.known.get(hash)
	if e == nil {
		e = c.unknown.get(hash)
	}
	if e != nil && now.Before(e.fresh) {
		defer c.mu.Unlock()
		return e.holder, nil
	}
	c.mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	// One question for all who wait for it; who came first must not take it along.
	h, err, _ := c.flight.Do(hash, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
		defer cancel()
		return c.ask(ctx, hash)
	})
	if err != nil {
		return nil, err
	}
	return h.(*Holder), nil
}

// ask asks a server, and remembers the answer.
func (c *TokenCache) ask(ctx context.Context, hash string) (*Holder, error) {
	h, err := c.question(ctx, hash)
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil && h != nil:
		c.asked.WithLabelValues("known").Inc()
		c.unknown.remove(hash)
		c.known.put(&remembered{hash: hash, holder: h, fresh: now.Add(TokenFresh), stale: now.Add(TokenStale)})
		return h, nil
	case err == nil:
		c.asked.WithLabelValues("unknown").Inc()
		c.known.remove(hash)
		c.unknown.put(&remembered{hash: hash, fresh: now.Add(unknownFresh)})
		return nil, nil
	}
	if e := c.known.get(hash); e != nil && now.Before(e.stale) {
		c.asked.WithLabelValues("stale").Inc()
		e.fresh = now.Add(askPause)
		return e.holder, nil
	}
	c.asked.WithLabelValues("failed").Inc()
	return nil, oip.Errorf(http.StatusServiceUnavailable, "the token cannot be checked now, since no server answers; try again in a moment")
}

func (c *TokenCache) question(ctx context.Context, hash string) (*Holder, error) {
	wait := time.NewTimer(maxAskWaiting)
	defer wait.Stop()
	select {
	case c.asking <- struct{}{}:
		defer func() { <-c.asking }()
		return c.tokens.Resolve(ctx, hash)
	case <-wait.C:
		return nil, fmt.Errorf("%d tokens are being asked for already", maxAsking)
	}
}

// remembered is what is known of a token.
type remembered struct {
	hash         string
	holder       *Holder // nil: there is no such token
	fresh, stale time.Time
}

// recent keeps a bounded number of tokens; the one used longest ago goes first.
type recent struct {
	most  int
	order *list.List // of *remembered, the last used first
	by    map[string]*list.Element
}

func newRecent(most int) recent {
	return recent{most: most, order: list.New(), by: map[string]*list.Element{}}
}

func (r *recent) get(hash string) *remembered {
	e := r.by[hash]
	if e == nil {
		return nil
	}
	r.order.MoveToFront(e)
	return e.Value.(*remembered)
}

func (r *recent) put(v *remembered) {
	r.remove(v.hash)
	r.by[v.hash] = r.order.PushFront(v)
	if r.order.Len() > r.most {
		r.remove(r.order.Back().Value.(*remembered).hash)
	}
}

func (r *recent) remove(hash string) {
	if e := r.by[hash]; e != nil {
		r.order.Remove(e)
		delete(r.by, hash)
	}
}
