package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/rxvision/rxvision/oip"
)

// answer is a worker's whole answer, kept until it is known to be whole, so
// that a replica that dies in the middle costs a retry and not an answer.
type answer struct {
	status  int
	header  http.Header
	body    []byte
	version *version
}

// write passes the answer on to the client.
func (a *answer) write(w http.ResponseWriter) error {
	for _, k := range []string{"Content-Type", oip.HeaderLength, "Retry-After"} {
		if v := a.header.Get(k); v != "" {
			w.Header().Set(k, v)
		}
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	w.WriteHeader(a.status)
	_, err := w.Write(a.body)
	return err
}

// forward has a replica answer the request. Inference changes nothing, so what
// a replica did not answer whole is asked of another one; while there is none,
// the request waits, for a bounded time and among a bounded number, for the
// routes to change. compose gives header and body for the chosen version.
func (g *Gateway) forward(c *request, accept func(*version) error, compose func(*version) (http.Header, [][]byte, error)) (*answer, error) {
	ctx := c.Context()
	var (
		skip  []*endpoint
		last  error
		begun int // attempts that a replica began to answer
		wait  *time.Timer
	)
	for {
		t := g.router.current.Load()
		versions, missing := t.find(c.model, c.ref)
		if missing != nil {
			return nil, missing
		}
		v, e := pick(versions, skip, g.turn.Add(1), time.Now())
		if e == nil {
			why, hope := unserved(c.model, versions)
			var busy *oip.Error
			if errors.As(last, &busy) && busy.Status == http.StatusTooManyRequests {
				return nil, busy
			}
			if !hope {
				return nil, why
			}
			if wait == nil {
				select {
				case g.held <- struct{}{}:
					defer func() { <-g.held }()
					defer g.load.hold(c.model)()
				default:
					return nil, oip.Errorf(503, "%s; %d requests wait for a replica already", why.Message, g.cfg.MaxHeld)
				}
				wait = time.NewTimer(g.cfg.Hold)
				defer wait.Stop()
			}
			select {
			case <-t.changed:
			case <-time.After(ejectFor / 4): // a rested replica may be usable again
			case <-wait.C:
				return nil, why
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			skip = nil
			continue
		}
		if accept != nil {
			if err := accept(v); err != nil {
				return nil, err
			}
		}
		header, body, err := compose(v)
		if err != nil {
			return nil, err
		}
		if c.attempts++; c.attempts > 1 {
			g.metrics.retries.Inc()
		}
		c.version, c.alloc = v.number, e.alloc
		a, err := g.ask(ctx, e, v, c.model, header, body)
		if err == nil {
			a.version = v
			return a, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if status := oip.StatusOf(err); status != 0 && status != http.StatusTooManyRequests {
			return nil, err
		}
		if !errors.Is(err, errNotBegun) {
			begun++
		}
		if begun >= maxAttempts {
			return nil, oip.Errorf(502, "model %q: %d attempts broke off; the last: %v", c.model, begun, err)
		}
		last, skip = err, append(skip, e)
	}
}

// errNotBegun says that a replica did not begin the work: trying again costs nothing.
var errNotBegun = errors.New("not begun")

// ask sends the request to one replica. Its error says that the replica did not
// answer: it could not be reached (then it rests for a moment), broke off, is
// draining (503) or full (429).
func (g *Gateway) ask(ctx context.Context, e *endpoint, v *version, model string, header http.Header, body [][]byte) (*answer, error) {
	e.inFlight.Add(1)
	defer e.inFlight.Add(-1)
	length := 0
	for _, part := range body {
		length += len(part)
	}
	scheme, host := "http", e.address
	if g.cfg.WorkerTLS != nil { // a connection belongs to the allocation, not to an address that another may come to have
		scheme, host = "https", e.alloc
		ctx = context.WithValue(ctx, endpointKey{}, e)
	}
	req := (&http.Request{
		Method: http.MethodPost, Host: e.address, Header: header, ContentLength: int64(length),
		URL:  &url.URL{Scheme: scheme, Host: host, Path: "/v2/models/" + model + "/versions/" + strconv.FormatUint(v.number, 10) + "/infer"},
		Body: &parts{rest: body}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	resp, err := g.client.RoundTrip(req)
	if err != nil {
		var broken *net.OpError
		if errors.As(err, &broken) && (broken.Op == "dial" || broken.Op == opAlert) {
			e.ejectedUntil.Store(time.Now().Add(ejectFor).UnixNano())
			g.metrics.ejected.Inc()
			return nil, fmt.Errorf("replica %s at %s: %w: %w", e.alloc, e.address, errNotBegun, err)
		}
		return nil, fmt.Errorf("replica %s at %s: %w", e.alloc, e.address, err)
	}
	defer resp.Body.Close()
	a := &answer{status: resp.StatusCode, header: resp.Header}
	if resp.ContentLength > g.cfg.MaxBody {
		return nil, oip.Errorf(502, "the model's answer of %d bytes is larger than this gateway's limit of %d", resp.ContentLength, g.cfg.MaxBody)
	}
	if n := resp.ContentLength; n >= 0 {
		a.body = make([]byte, n)
		_, err = io.ReadFull(resp.Body, a.body)
	} else {
		a.body, err = io.ReadAll(io.LimitReader(resp.Body, g.cfg.MaxBody+1))
		if err == nil && int64(len(a.body)) > g.cfg.MaxBody {
			return nil, oip.Errorf(502, "the model's answer is larger than this gateway's limit of %d bytes", g.cfg.MaxBody)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("replica %s broke off its answer: %w", e.alloc, err)
	}
	switch a.status {
	case http.StatusServiceUnavailable:
		return nil, fmt.Errorf("replica %s is not ready: %w: %s", e.alloc, errNotBegun, a.body)
	case http.StatusTooManyRequests:
		return nil, oip.Errorf(429, "all replicas of model %q are busy; try again in a moment", model)
	case http.StatusOK:
		e.queue.add(a.header.Get(oip.HeaderQueueTime))
	}
	return a, nil
}

// opAlert is the Op of errors by which crypto/tls says that the other end refused us.
const opAlert = "remote error"

// dialWorker connects to a worker.
func dialWorker(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
}

// endpointKey is for the endpoint in a request's context, which says where its
// allocation is.
type endpointKey struct{}

// dialSecure connects to an endpoint's worker and makes sure that it is the one.
func (g *Gateway) dialSecure(ctx context.Context, network, _ string) (net.Conn, error) {
	e, ok := ctx.Value(endpointKey{}).(*endpoint)
	if !ok {
		return nil, errors.New("a request for no endpoint") // only ask makes requests
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := dialWorker(ctx, network, e.address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, g.cfg.WorkerTLS(e.alloc))
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the handshake's error says more
		return nil, &net.OpError{Op: "dial", Net: network, Addr: raw.RemoteAddr(), Err: fmt.Errorf("TLS: %w", err)}
	}
	return conn, nil
}

// parts reads byte slices one after another without joining them.
type parts struct{ rest [][]byte }

func (p *parts) Read(b []byte) (int, error) {
	for len(p.rest) > 0 && len(p.rest[0]) == 0 {
		p.rest = p.rest[1:]
	}
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.rest[0])
	p.rest[0] = p.rest[0][n:]
	return n, nil
}

func (p *parts) Close() error { return nil }
