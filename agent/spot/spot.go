// Package spot hears from the provider of a machine that it will be taken away: from the metadata service of AWS, Google
// Cloud or Azure, or, on premises, from a file.
//
// Nothing is asked unless a provider is configured. Requests go to link-local addresses of the machine itself, never through a
// proxy. A service that does not answer is asked again, ever less often; that alone is no notice.
package spot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Notice says that the machine will be taken away.
type Notice struct {
	Reason string    // one sentence for an operator
	At     time.Time // when; zero: not known, and not certain
}

// Provider is where notices come from.
type Provider interface {
	// Spot says whether the machine is one that may be taken away.
	Spot(ctx context.Context) (bool, error)
	// Watch calls report with each change until ctx ends, which is its only way to return: nil says that there is no
	// notice, also when it begins.
	Watch(ctx context.Context, report func(*Notice))
}

// The names of providers.
const (
	AWS   = "aws"
	GCP   = "gcp"
	Azure = "azure"
	File  = "file"
)

// Options say where notices come from.
type Options struct {
	Provider string        // AWS, GCP, Azure or File
	Endpoint string        // base URL of the metadata service; "": the provider's own
	Path     string        // of the file
	Every    time.Duration // between two looks; 0: DefaultEvery
	Warn     func(error)   // hears of services that do not answer; nil: nobody does
}

// linkLocal is where all three providers serve metadata to a machine.
const linkLocal = "http://169.254.169.254"

const (
	// DefaultEvery is what AWS recommends between two looks; of Azure's and Google's notices of 30 s it leaves 25.
	DefaultEvery = 5 * time.Second
	// maxPause bounds the time between two attempts to reach a service that does not answer.
	maxPause = time.Minute
	// askLimit bounds one question.
	askLimit = 5 * time.Second
	// maxAnswer bounds what is read of an answer, or of the file.
	maxAnswer = 64 << 10
)

// Open gives the provider that the options name.
func Open(o Options) (Provider, error) {
	if o.Every <= 0 {
		o.Every = DefaultEvery
	}
	if o.Warn == nil {
		o.Warn = func(error) {}
	}
	if o.Provider == File {
		if o.Path == "" {
			return nil, errors.New("spot provider file: no path given")
		}
		return &file{o}, nil
	}
	if o.Provider != AWS && o.Provider != GCP && o.Provider != Azure {
		return nil, fmt.Errorf("spot provider %q is not known; known: %s, %s, %s, %s", o.Provider, AWS, GCP, Azure, File)
	}
	base := linkLocal
	if o.Endpoint != "" {
		base = strings.TrimSuffix(o.Endpoint, "/")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy, transport.DisableKeepAlives = nil, true
	m := metadata{o, base, &http.Client{Transport: transport}}
	switch o.Provider {
	case AWS:
		return &aws{metadata: m}, nil
	case GCP:
		return &gcp{m}, nil
	}
	return &azure{m}, nil
}

// metadata asks a metadata service.
type metadata struct {
	Options
	base   string
	client *http.Client
}

// statusError is an answer other than 200.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("answers with status %d", int(e)) }

// ask makes one request; headers are NAME, VALUE, ….
func (m *metadata) ask(ctx context.Context, method, path, body string, limit time.Duration, headers ...string) (text string, header http.Header, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, m.base+path, strings.NewReader(body))
	if err != nil {
		return "", nil, err
	}
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := m.client.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", nil, fmt.Errorf("%s%s: %w", m.base, path, statusError(resp.StatusCode))
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return string(b), resp.Header, err
}

// absent says whether the service answers that there is no such thing.
func absent(err error) bool {
	var s statusError
	return errors.As(err, &s) && s == http.StatusNotFound
}

// watch looks again and again and reports what is new. After a look that fails it waits ever longer.
func (o *Options) watch(ctx context.Context, report func(*Notice), look func(context.Context) (*Notice, error)) {
	var told *Notice
	first, pause := true, o.Every
	for {
		n, err := look(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			o.Warn(fmt.Errorf("notices of interruption (%s): %w", o.Provider, err))
			pause = min(2*pause, max(maxPause, o.Every))
		default:
			pause = o.Every
			if first || (n == nil) != (told == nil) || n != nil && (n.Reason != told.Reason || !n.At.Equal(told.At)) {
				report(n)
			}
			first, told = false, n
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}
