package spot

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// gcp asks the metadata server of Google Compute Engine
// (https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption).
type gcp struct{ metadata }

// gcpNotice is the time from Google's notice to the end of the machine.
const gcpNotice = 30 * time.Second

// changeWait is how long the server holds a question for a change back.
const changeWait = 20 * time.Second

func (p *gcp) get(ctx context.Context, path string, limit time.Duration) (is bool, etag string, err error) {
	text, header, err := p.ask(ctx, http.MethodGet, "/computeMetadata/v1/instance/"+path, "", limit, "Metadata-Flavor", "Google")
	return strings.EqualFold(strings.TrimSpace(text), "true"), header.Get("ETag"), err
}

// Spot machines are scheduled as preemptible ones too.
func (p *gcp) Spot(ctx context.Context) (bool, error) {
	is, _, err := p.get(ctx, "scheduling/preemptible", askLimit)
	return is, err
}

// Watch asks how it stands, and then for what is other than that, which the server answers when it comes.
func (p *gcp) Watch(ctx context.Context, report func(*Notice)) {
	var notice *Notice
	etag := ""
	p.watch(ctx, report, func(ctx context.Context) (*Notice, error) {
		path, limit := "preempted", askLimit
		if etag != "" {
			path += fmt.Sprintf("?wait_for_change=true&timeout_sec=%d&last_etag=%s", changeWait/time.Second, url.QueryEscape(etag))
			limit += changeWait
		}
		gone, now, err := p.get(ctx, path, limit)
		if err != nil {
			etag = ""
			return nil, err
		}
		etag = now
		switch {
		case !gone:
			notice = nil
		case notice == nil:
			notice = &Notice{Reason: "Google Cloud preempts the instance", At: time.Now().Add(gcpNotice)}
		}
		return notice, nil
	})
}
