"""A server's session that does not care what silos agreed to."""

from __future__ import annotations

from dataclasses import replace

from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase


class CarelessSession(AggregatorSession):
    """Asks for any names, whoever has agreed to which."""

    def joinable(self) -> list[str]:
        return sorted(self.ads)

    def close(self) -> None:
        ads = self.ads
        if self.phase in (Phase.SHARE, Phase.UPLOAD):
            unbound = {name: ad.body.model_copy(update={"agreed": []}) for name, ad in ads.items()}
            self.ads = {name: replace(ad, body=unbound[name]) for name, ad in ads.items()}
        try:
            super().close()
        finally:
            if self.phase > Phase.SHARE:
                self.ads = ads
